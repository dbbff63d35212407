"""Hidden states on the disk of the node: made once, whichever worker comes first, and read by all that run there.

One file per trial in $TMPDIR, named after all that its contents depend on. Every row has a lock and a mark of being there,
so that workers share the work and a killed one leaves nothing that is taken for whole. The last one to let go removes the
file; what killed ones have left goes when the next trial starts there.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import torch

from alphatoken.pipeline.run.failure import RunFailed

STORED = torch.bfloat16
PREFIX = "alphatoken-hidden-"
IN_USE = 1 << 40  # the place of the lock that every user of a file shares, beyond all rows
PAGE = mmap.ALLOCATIONGRANULARITY


class HiddenStates:
    """Hidden states (length, width) of sequences by their number, rounded to STORED.

    ``name``: of all that they depend on. ``lengths``: of the sequences, in tokens. ``bound``: bytes of the file at most; what
    does not fit is made anew each time, to the same numbers.
    """

    def __init__(self, name: str, lengths: Sequence[int], width: int, bound: int) -> None:
        remove_unused()
        ends = list(accumulate(length * width * STORED.itemsize for length in lengths))
        self.lengths, self.width = list(lengths), width
        self.rows = sum(end <= bound for end in ends)  # that are kept: the first ones
        self._starts = [0, *ends]
        self._first = -(-max(1, self.rows) // PAGE) * PAGE  # behind the marks
        size = self._first + self._starts[self.rows]
        path = Path(tempfile.gettempdir()) / f"{PREFIX}{os.getuid()}-{name}"
        self._file = _opened(path)
        self._lock(IN_USE, fcntl.LOCK_SH)
        if os.fstat(self._file).st_size < size:
            os.ftruncate(self._file, size)
        self._map = mmap.mmap(self._file, size)
        self._gone = weakref.finalize(self, _let_go, self._file, path)

    def fill(self, rows: Sequence[int], make: Callable[[int], torch.Tensor]) -> None:
        """Have ``rows`` there, as far as they are kept; others at work on one make it meanwhile. ``make(row)`` makes one."""
        for wait in (fcntl.LOCK_NB, 0):  # first those that nobody is at work on
            for row in rows:
                if row < self.rows and not self._map[row]:
                    self._make(row, make, wait)

    def get(self, row: int, make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The state of a row in STORED, on the host, not to be written to; ``make(row)`` makes it where it is not there."""
        if row >= self.rows:
            return make(row).to("cpu", STORED).contiguous()
        if not self._map[row]:
            self._make(row, make, 0)
        start, length = self._first + self._starts[row], self.lengths[row]
        return torch.frombuffer(self._map, dtype=STORED, count=length * self.width, offset=start).view(length, -1)

    def _make(self, row: int, make: Callable[[int], torch.Tensor], wait: int) -> None:
        try:
            self._lock(row, fcntl.LOCK_EX | wait)
        except BlockingIOError:
            return
        try:
            if not self._map[row]:
                state = make(row).to("cpu", STORED).contiguous()
                content = memoryview(state.view(torch.uint8).numpy().tobytes())
                start = self._first + self._starts[row]
                while content:  # a disk that is nearly full takes a part, and only then says so
                    written = os.pwrite(self._file, content, start)
                    content, start = content[written:], start + written
                os.pwrite(self._file, b"\x01", row)  # only now it is there
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, row)

    def _lock(self, place: int, how: int) -> None:
        fcntl.lockf(self._file, how, 1, place)


def remove_unused() -> None:
    """Remove files of trials that nobody uses any more, such as killed ones leave."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}{os.getuid()}-*"):
        with suppress(OSError):  # another has been quicker
            _let_go(os.open(path, os.O_RDWR | os.O_NOFOLLOW), path)


def _let_go(file: int, path: Path) -> None:
    """Close a file, and remove it where no other process uses it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, IN_USE)
        path.unlink(missing_ok=True)
    except OSError:
        pass
    finally:
        os.close(file)


def _opened(path: Path) -> int:
    """A file of one's own, made where it is not there. Raises RunFailed for somebody else's."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    if os.fstat(file).st_uid != os.getuid():
        os.close(file)
        raise RunFailed(f"trial: {path} belongs to another user: set TMPDIR to a directory of your own")
    return file

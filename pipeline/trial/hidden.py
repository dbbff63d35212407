"""Hidden states on the disk of the node: made once, read for every fine-tune."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import torch

STORED = torch.bfloat16


class HiddenFile:
    """Hidden states (length, d) by key in one file without a name, which is gone with the process whatever ends it.

    ``bound``: its bytes at most; what does not fit is made anew each time, to the same numbers: all are rounded to STORED.
    Lies in $TMPDIR.
    """

    def __init__(self, bound: int) -> None:
        self.bound, self.size = bound, 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as this lives
        self._places: dict[str, tuple[int, torch.Size]] = {}

    def get(self, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The state of ``key`` in STORED, on the host; ``make()`` makes it."""
        if key in self._places:
            start, shape = self._places[key]
            content = bytearray(os.pread(self._file.fileno(), shape.numel() * STORED.itemsize, start))
            return torch.frombuffer(content, dtype=STORED).view(shape)
        state = make().to("cpu", STORED).contiguous()
        made = state.view(torch.uint8).numpy().tobytes()
        if self.size + len(made) <= self.bound:
            os.pwrite(self._file.fileno(), made, self.size)
            self._places[key] = (self.size, state.shape)
            self.size += len(made)
        return state

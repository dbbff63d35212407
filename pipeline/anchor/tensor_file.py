"""A file of float32 tensors read by rows, so that of a large sum only what is being worked at is in memory."""

from __future__ import annotations

import json
import math
from types import TracebackType

import torch

from alphatoken.pipeline.anchor.tensors import Shapes
from alphatoken.pipeline.run.attempts import insist
from alphatoken.pipeline.run.storage import Storage

BYTES = 4  # of a number


class TensorFile:
    """Opened for a ``with`` block. ``shapes``: by name, sorted. Raises OSError, also where the file is cut off."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._name, self._insist = name, not storage.local
        self._file = storage.fs.open_input_file(storage.path(name))
        try:
            size = int.from_bytes(self._bytes(0, 8), "little")
            header = json.loads(self._bytes(8, size))
        except BaseException:
            self._file.close()
            raise
        header.pop("__metadata__", None)
        self._starts = {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items()}
        other = [key for key, entry in header.items() if entry["dtype"] != "F32"]
        assert not other, f"{name}: {other[0]} is not float32"
        self.shapes: Shapes = {key: tuple(header[key]["shape"]) for key in sorted(header)}

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def whole(self, key: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        return self.rows(key, 0, rows_of(self.shapes[key]))

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """The rows of its first axis from ``start`` to before ``stop``, in memory of their own; a number is one row."""
        shape = self.shapes[key]
        found = torch.empty((stop - start, *shape[1:]) if shape else ())
        row = row_bytes(shape)
        self._fill(found.reshape(-1).view(torch.uint8).numpy().data, self._starts[key] + start * row)
        return found

    def _bytes(self, start: int, count: int) -> bytes:
        content = bytearray(count)
        self._fill(memoryview(content), start)
        return bytes(content)

    def _fill(self, target: memoryview, start: int) -> None:
        def fill() -> None:
            self._file.seek(start)
            done = 0
            while done < len(target):
                came = self._file.readinto(target[done:])
                if not came:
                    raise OSError(f"{self._name} is cut off: run the same command again")
                done += came

        insist(fill) if self._insist else fill()


def rows_of(shape: tuple[int, ...]) -> int:
    """The length of the first axis; 1 for a number."""
    return shape[0] if shape else 1


def row_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of one row of the first axis."""
    return BYTES * math.prod(shape[1:])

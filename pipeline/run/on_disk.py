"""Arrays that grow with the data: a file on this node's disk, mapped, whose pages the kernel may take back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.run.cache import cache_directory

CHUNK = 1 << 20  # numbers


def on_disk(dtype: npt.DTypeLike, chunks: Iterable[npt.NDArray]) -> npt.NDArray:
    """The numbers of all ``chunks``, one after the other, (numbers,), to be read and written.

    The file lies in the user's cache directory and has no name, so that a killed process leaves nothing. Raises OSError
    naming the directory where it is full; all of the room is taken here, since a page without room ends the process.
    """
    place = cache_directory()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place) as file:
        try:
            for chunk in chunks:
                file.write(np.ascontiguousarray(chunk, dtype).data)
            file.flush()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: {place} ($ALPHATOKEN_CACHE)") from error
        if not file.tell():
            return np.zeros(0, dtype)
        return np.asarray(np.memmap(file, dtype, "r+"))  # which holds the file


def zeros_on_disk(dtype: npt.DTypeLike, count: int) -> npt.NDArray:
    """As many zeros."""
    return on_disk(dtype, (np.zeros(min(CHUNK, count - at), dtype) for at in range(0, count, CHUNK)))

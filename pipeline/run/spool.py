"""A file for an object store, put together on this node's disk and not in memory.

An object is uploaded as a whole (see storage.py), and one of a large model has gigabytes: what is held of it meanwhile are
pages of a file, which the kernel may take back, and not memory of the process.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from typing import IO

import pyarrow as pa

from alphatoken.pipeline.run.cache import cache_directory


class Spool:
    """A stream in the user's cache directory; ``upload`` gets all of it when the ``with`` block ends without an exception.

    The file has no name, so that a killed process leaves nothing. Raises OSError naming the directory where it is full.
    """

    def __init__(self, upload: Callable[[pa.Buffer], None]) -> None:
        self._upload, self._directory = upload, cache_directory()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Spool:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=self._directory)  # it is closed in __exit__
        return self

    def write(self, content: bytes | memoryview) -> None:
        """Add ``content``."""
        assert self._file is not None
        try:
            self._file.write(content)
        except OSError as error:
            raise self._told(error) from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._file is not None
        with self._file as file:
            if kind is not None:
                return
            try:
                file.flush()
            except OSError as error:
                raise self._told(error) from error
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
                buffer = pa.py_buffer(pages)
                try:
                    self._upload(buffer)
                finally:
                    del buffer  # else the pages cannot be let go of

    def _told(self, error: OSError) -> OSError:
        return OSError(error.errno, f"{error.strerror}: {self._directory} ($ALPHATOKEN_CACHE), before an upload")

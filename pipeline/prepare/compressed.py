"""Files of text, compressed or not, as a stream of bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import PurePath
from typing import IO, Any, cast

import pyarrow as pa

_OPEN: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), "zstd")),
}
COMPRESSIONS = tuple(_OPEN)
BROKEN = (EOFError, zlib.error, lzma.LZMAError)  # besides OSError: what a damaged file raises


def suffixes(path: PurePath) -> tuple[str, str]:
    """(".jsonl", ".gz") of train.JSONL.gz: the format and the compression, "" where there is none."""
    last = path.suffix.lower()
    return (PurePath(path.stem).suffix.lower(), last) if last in _OPEN else (last, "")


def opened(path: str) -> IO[bytes]:
    """The bytes of a file, decompressed as its name says."""
    _, compression = suffixes(PurePath(path))
    return cast("IO[bytes]", _OPEN[compression](path) if compression else open(path, "rb"))

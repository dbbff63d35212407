"""One copy per node of a file of the run directory that all workers of the node map into memory.

On a disk that the nodes share the file itself is mapped, and the kernel reads it once for all workers of a node. From an
object store it comes into the user's cache, once, whoever of the node's workers asks first; the others wait for it. A copy
goes when another version of the file comes, or when nothing has asked for it for a week.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath

from filelock import FileLock

from alphatoken.pipeline.run.cache import cache_directory
from alphatoken.pipeline.run.remote import copied
from alphatoken.pipeline.run.storage import Storage

DAYS = 7.0
HEAD = 1 << 20  # bytes; of safetensors, what says which run the file is of


def node_copy(storage: Storage, name: str) -> Path:
    """The file ``name`` of an object store on this node's disk. Raises OSError, or Unreachable, which is one.

    It is known by its size, the time of its last change (which may be whole seconds) and its first bytes.
    """
    path = storage.path(name)
    info = storage.info(name)
    with storage.fs.open_input_file(path) as file:
        head = file.read_at(min(HEAD, info.size), 0)
    seen = hashlib.sha256(f"{info.size} {info.mtime_ns}\n".encode() + head).hexdigest()[:24]
    place = _place() / hashlib.sha256(f"{storage.fs.type_name} {path}".encode()).hexdigest()[:24]
    final = place / seen / PurePosixPath(path).name
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):
        if not final.is_file():
            for other in place.iterdir():
                if other.is_dir():  # an older version; who has it mapped keeps its pages
                    shutil.rmtree(other, ignore_errors=True)
            copied(storage.fs, path, info.size, final, f"{storage.fs.type_name}://{path}")
            _forget()
        os.utime(final)
    return final


def _place() -> Path:
    return cache_directory() / "anchors"


def _forget() -> None:
    """Take away what nothing has asked for in DAYS."""
    for file in _place().glob("*/*/*"):
        with suppress(OSError):  # another worker was faster
            if time.time() - file.stat().st_mtime > DAYS * 86400:
                file.unlink()

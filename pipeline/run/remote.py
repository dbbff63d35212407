"""Data and models behind a URI: listed through pyarrow.fs and fetched into the user's cache, once per version.

A file's version is what the store says of it: size and time of the last change. Fetched files lie under a name made
from the URI and the version, appear there when they are complete, and are taken from there by every later run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.fs as pafs

from alphatoken.pipeline.run.attempts import insist
from alphatoken.pipeline.run.cache import cache_directory
from alphatoken.pipeline.run.redaction import redacted
from alphatoken.pipeline.run.seen import seen_of_file

if TYPE_CHECKING:
    from alphatoken.pipeline.maths.model_source import ModelSource

MODEL_FILES = (".safetensors", ".json", ".bin", ".gguf", ".model", ".jinja", ".txt", ".py")
WEIGHTS = (".safetensors", ".bin", ".gguf")
BLOCK = 8 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Unreachable(OSError):
    """A URI names nothing, or its store does not answer."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a store. ``uri``: without secrets, for reports; ``version``: changes whenever the file does; ``about``: size
    and time of the last change, for people.
    """

    fs: pafs.FileSystem
    path: str
    uri: str
    size: int
    version: str
    about: str = ""

    def fetched(self) -> Path:
        """The file in the cache. Raises Unreachable."""
        final = _cached(self.uri, self.version) / PurePosixPath(self.path).name
        if not final.is_file():
            _copy(self, final)
        return final


def is_remote(name: str) -> bool:
    """Whether a setting is the URI of an object store."""
    return "://" in name and not name.startswith("file://")


def list_files(uri: str) -> list[RemoteFile]:
    """The file that ``uri`` names, or all below it, sorted; none where there is nothing. Raises Unreachable."""
    try:
        fs, path = insist(lambda: pafs.FileSystem.from_uri(uri))
        info = insist(lambda: fs.get_file_info(path))
        selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
        found = [info] if info.type == pafs.FileType.File else insist(lambda: fs.get_file_info(selector))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise Unreachable(f"{redacted(uri)} cannot be read: {redacted(_line(error))}") from error
    scheme = uri.partition("://")[0]
    return [
        RemoteFile(
            fs, each.path, f"{scheme}://{each.path}", each.size, f"{each.size}-{each.mtime_ns}",
            seen_of_file(each.size, (each.mtime_ns or 0) / 1e9),
        )
        for each in sorted(found, key=lambda info: info.path)
        if each.type == pafs.FileType.File
    ]  # fmt: skip


def model_files(uri: str) -> dict[str, RemoteFile]:
    """Name -> file of a model directory behind a URI. Raises Unreachable."""
    files = list_files(uri)
    top = min((len(PurePosixPath(f.path).parts) for f in files), default=0)
    direct = [f for f in files if len(PurePosixPath(f.path).parts) == top]
    return {PurePosixPath(f.path).name: f for f in direct if f.path.endswith(MODEL_FILES)}


def here(source: ModelSource, weights: bool = True) -> ModelSource:
    """A model in a directory of this machine; one behind a URI is fetched. Raises Unreachable.

    ``weights``: those as well, which a tokenizer and a configuration do not need.
    """
    if not is_remote(source.path):
        return source
    files = [f for name, f in model_files(source.path).items() if weights or not name.endswith(WEIGHTS)]
    if not files:
        raise Unreachable(f"{redacted(source.path)}: there is no model")
    folder = _cached(*[f"{f.uri} {f.version}" for f in files])
    if not folder.is_dir():
        beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        try:
            for file in files:
                _copy(file, beside / PurePosixPath(file.path).name)
            try:
                os.rename(beside, folder)
            except OSError:
                if not folder.is_dir():  # another worker of this machine was faster
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return replace(source, path=str(folder))


def _cached(*version: str) -> Path:
    return cache_directory() / "remote" / hashlib.sha256("\n".join(version).encode()).hexdigest()[:24]


def _copy(file: RemoteFile, final: Path) -> None:
    copied(file.fs, file.path, file.size, final, file.uri)


def copied(fs: pafs.FileSystem, path: str, size: int, final: Path, uri: str) -> None:
    """Copy a file of ``size`` bytes to ``final``, where it appears when it is complete. Raises Unreachable naming ``uri``, and
    the directory where its disk is full.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")

    def copy() -> None:
        with fs.open_input_stream(path) as source, open(beside, "wb") as target:
            while block := source.read(BLOCK):
                target.write(block)
        if beside.stat().st_size != size:
            raise OSError(f"{beside.stat().st_size} of {size} bytes came")

    try:
        insist(copy)
        os.replace(beside, final)
    except OSError as error:
        place = f" into {final.parent} ($ALPHATOKEN_CACHE)" if error.errno in FULL else ""
        raise Unreachable(f"{uri} cannot be fetched{place}: {redacted(_line(error))}") from error
    finally:
        beside.unlink(missing_ok=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())

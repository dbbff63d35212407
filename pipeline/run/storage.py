"""Files of a run directory, on a local disk or an object store, complete under their final name or absent."""

import json
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from alphatoken.data_schemas import check
from alphatoken.pipeline.run.attempts import insist
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.noted import Footer, Listed, believed
from alphatoken.pipeline.run.redaction import redacted
from alphatoken.pipeline.run.spool import Spool

FINGERPRINT_KEY = b"alphatoken.fingerprint"
COUNTS_KEY = b"alphatoken.counts"
ROWS_PER_GROUP = 2048
MANIFEST, LOCK = "run.json", ".lock"  # what the directory of a run has
OPENED_AT_ONCE = 16  # footers: a store answers after a while, and a disk while others wait
T = TypeVar("T")


class Storage:
    """A directory tree addressed by relative names with forward slashes.

    ``root`` is a local path or a URI that pyarrow.fs understands (``file://``, ``s3://``, ``gs://``). On a local disk
    a file is written beside its final place, flushed to the disk and renamed. For an object store it is put together
    in memory and uploaded as a whole: the store shows an object only when the upload is complete, and a failed upload
    is begun again. ``place``: what somebody would type. Instances can be pickled.
    Raises OSError where the disk or the store refuses, and SettingsWrong for a URI that cannot be read.
    """

    def __init__(self, root: str) -> None:
        if "://" in root:
            try:
                self.fs, self.root = pafs.FileSystem.from_uri(root)
            except pa.ArrowInvalid as error:
                raise SettingsWrong(
                    [f"{redacted(root)}: {redacted(str(error))}: give a directory or a URI such as s3://bucket/run"]
                ) from error
            self.place = root.rstrip("/")
        else:
            self.fs, self.root = pafs.LocalFileSystem(), str(Path(root).expanduser().resolve())
            self.place = self.root
        self.local = isinstance(self.fs, pafs.LocalFileSystem)

    def path(self, name: str) -> str:
        """The path of ``name`` within the file system."""
        return f"{self.root}/{name}" if name else self.root

    def shown(self, name: str) -> str:
        """Where ``name`` is, for people: with the scheme of a store, without what is secret in a URI."""
        place, mark, parameters = self.place.partition("?") if "://" in self.place else (self.place, "", "")
        return redacted(f"{place}/{name}{mark}{parameters}")

    def exists(self, name: str) -> bool:
        """Whether a file or directory of that name is there."""
        return self._insist(lambda: self.fs.get_file_info(self.path(name)).type) != pafs.FileType.NotFound

    def info(self, name: str) -> pafs.FileInfo:
        """Size and time of the last change of a file. Raises FileNotFoundError."""
        found = self._insist(lambda: self.fs.get_file_info(self.path(name)))
        if found.type != pafs.FileType.File:
            raise FileNotFoundError(f"{self.path(name)} is not there")
        return found

    def names(self, directory: str) -> list[str]:
        """Sorted relative names of the files directly below ``directory``."""
        return sorted(name for name in self.modified(directory) if not name.rpartition("/")[2].startswith("."))

    def modified(self, directory: str) -> dict[str, float]:
        """Relative name -> seconds since 1970 at which the store says it was written, of the files directly below."""
        return {name: one.modified for name, one in self.listed(directory).items()}

    def listed(self, directory: str) -> dict[str, Listed]:
        """Relative name -> what one listing says of it, of the files directly below ``directory``."""
        selector = pafs.FileSelector(self.path(directory), allow_not_found=True)
        found = self._insist(lambda: self.fs.get_file_info(selector))
        return {
            f"{directory}/{info.base_name}": Listed((info.mtime_ns or 0) / 1e9, info.size)
            for info in found
            if info.type == pafs.FileType.File
        }

    def remove(self, name: str) -> None:
        """Remove a file or a whole directory; absent ones are fine."""
        kind = self._insist(lambda: self.fs.get_file_info(self.path(name)).type)
        with suppress(FileNotFoundError):
            if kind == pafs.FileType.Directory:
                self._insist(lambda: self.fs.delete_dir(self.path(name)))
            elif kind == pafs.FileType.File:
                self._insist(lambda: self.fs.delete_file(self.path(name)))

    def remove_if_empty(self, directory: str) -> None:
        """Remove a local directory that holds nothing; object stores have none."""
        if self.local:
            with suppress(OSError):
                os.rmdir(self.path(directory))

    def sweep(self) -> None:
        """Remove what writers that were killed have left beside the final names. Only for who holds the run's lock.

        Directories below that have a lock or a manifest of their own are other runs, which may be at work.
        """
        if not self.local:
            return
        for place, directories, files in os.walk(self.root):
            inside = [
                d for d in directories if not any(os.path.lexists(f"{place}/{d}/{own}") for own in (MANIFEST, LOCK))
            ]
            directories[:] = inside
            for name in files:
                if name.startswith(".") and name.endswith(".tmp"):
                    Path(place, name).unlink(missing_ok=True)

    def read_bytes(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError."""

        def read() -> bytes:
            with self.fs.open_input_stream(self.path(name)) as stream:
                return stream.read()

        return self._insist(read)

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        """Write a file; it appears under its name only when it is complete."""
        if not self.local:
            self._upload(name, content)
            return
        with _Rename(self, name) as stream:
            stream.write(content)

    def open_writer(self, name: str) -> "_Rename | Spool":
        """A context whose stream has ``write``, for large files: nothing of it is held in memory, and it appears under its
        name when the block ends without an exception. For an object store it is put together on this node's disk.
        """
        return _Rename(self, name) if self.local else Spool(lambda content: self._upload(name, content))

    def read_json(self, name: str) -> Any:
        """The JSON value in a file."""
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON value, indented, keys in the order given."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def write_table(self, name: str, table: pa.Table, fingerprint: str, counts: dict[str, Any] | None = None) -> None:
        """Write a Parquet part with the fingerprint of the stage that made it, and what was counted on the way."""
        with self.table_writer(name, table.schema, fingerprint, counts) as part:
            part.write(table)

    @contextmanager
    def table_writer(
        self, name: str, schema: pa.Schema, fingerprint: str, counts: dict[str, Any] | None = None
    ) -> Iterator["PartWriter"]:
        """Write a Parquet part table by table; it appears under its name when the ``with`` block ends.

        zstd level 3, byte-stream-split for floats, dictionaries only for strings, page index on. The bytes do not
        depend on how the rows are cut into tables.
        """
        strings = [field.name for field in schema if pa.types.is_string(field.type)]
        floats = [
            f"{field.name}.list.element"
            for field in schema
            if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)
        ]
        metadata = {**(schema.metadata or {}), FINGERPRINT_KEY: fingerprint.encode()}
        if counts is not None:
            metadata[COUNTS_KEY] = json.dumps(counts, sort_keys=True).encode()
        with (
            (_Rename if self.local else _Upload)(self, name) as stream,
            pq.ParquetWriter(
                stream,
                schema.with_metadata(metadata),
                compression="zstd",
                compression_level=3,
                use_dictionary=strings or False,
                use_byte_stream_split=floats or False,
                write_page_index=True,
            ) as writer,
        ):
            part = PartWriter(writer, schema)
            yield part
            part.flush()

    def read_table(self, name: str, schema: pa.Schema) -> pa.Table:
        """Read a whole Parquet part; raises SchemaMismatch when it has not the schema expected."""
        with pq.ParquetFile(self.path(name), filesystem=self.fs) as file:
            check(file.schema_arrow, schema, name)
            return file.read()

    def read_batches(
        self, name: str, schema: pa.Schema, rows: int = ROWS_PER_GROUP, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Read a Parquet part at most ``rows`` rows at a time, for passes whose memory must not grow with the part.

        ``columns``: those to read; default: all.
        """
        with pq.ParquetFile(self.path(name), filesystem=self.fs) as file:
            check(file.schema_arrow, schema, name)
            yield from file.iter_batches(batch_size=rows, columns=None if columns is None else list(columns))

    def footers(self, directory: str, parts: Iterable[str], fingerprint: str) -> dict[str, Footer]:
        """Part -> footer, in the order of ``parts``, of those below ``directory`` that are complete and carry ``fingerprint``.

        One listing says which are there; what notes (noted.py) do not speak of is opened, OPENED_AT_ONCE at a time.
        """
        there = self.listed(directory)
        known: dict[str, Footer | None] = dict(believed(self, directory, there, fingerprint))
        names = [part for part in parts if f"{directory}/{part}" in there]
        unknown = [part for part in names if part not in known]
        if unknown:
            with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
                opened = threads.map(lambda part: self._footer(f"{directory}/{part}", fingerprint), unknown)
                known.update(zip(unknown, opened, strict=True))
        return {part: footer for part in names if (footer := known[part]) is not None}

    def rows_of(self, name: str, fingerprint: str) -> int | None:
        """The row count of a complete part that carries ``fingerprint``; None where it has to be written (again)."""
        found = self._footer(name, fingerprint) if self.exists(name) else None
        return None if found is None else found.rows

    def counts_of(self, name: str, fingerprint: str) -> dict[str, Any] | None:
        """The counts that a complete part was written with; None where it has to be written (again)."""
        found = self._footer(name, fingerprint) if self.exists(name) else None
        return None if found is None else found.counts or None

    def _footer(self, name: str, fingerprint: str) -> Footer | None:
        def read() -> tuple[int, dict[bytes, bytes]] | None:
            try:
                with pq.ParquetFile(self.path(name), filesystem=self.fs) as file:
                    return file.metadata.num_rows, file.schema_arrow.metadata or {}
            except (pa.ArrowInvalid, OSError) as error:
                # Cut off or overwritten: not what this program leaves under a final name. Arrow reports a footer of
                # garbage as an error of input and output.
                if isinstance(error, pa.ArrowInvalid) or "thrift" in str(error).lower():
                    return None
                raise

        found = self._insist(read)
        if found is None or found[1].get(FINGERPRINT_KEY) != fingerprint.encode():
            return None
        return Footer(found[0], json.loads(found[1].get(COUNTS_KEY, b"{}"), object_pairs_hook=_with_known_keys))

    def _upload(self, name: str, content: Any) -> None:
        def write() -> None:
            with self.fs.open_output_stream(self.path(name)) as stream:
                stream.write(content)

        self._insist(write)

    def _insist(self, attempt: Callable[[], T]) -> T:
        return attempt() if self.local else insist(attempt)


class PartWriter:
    """Cuts the tables that it is given into row groups of ROWS_PER_GROUP rows; made by ``Storage.table_writer``."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._held = writer, schema.empty_table()

    def write(self, table: pa.Table) -> None:
        """Add the rows of ``table``; at most one row group of rows is held back."""
        self._held = pa.concat_tables([self._held, table])
        while self._held.num_rows >= ROWS_PER_GROUP:
            self._group(self._held.slice(0, ROWS_PER_GROUP))
            self._held = self._held.slice(ROWS_PER_GROUP)

    def flush(self) -> None:
        """Write the rest. A part without rows has no row group: `datasets` cannot read an empty one."""
        if self._held.num_rows:
            self._group(self._held)

    def _group(self, table: pa.Table) -> None:
        # One chunk per column, since the writer breaks pages at the borders of chunks.
        self._writer.write_table(table.combine_chunks(), row_group_size=ROWS_PER_GROUP)


class _Upload:
    """An output stream in memory, uploaded when the ``with`` block ends without an exception.

    Arrow's own upload streams commit what they have when they are dropped, so that an exception in the middle of
    writing, or between the rows and the footer, would leave part of a file under its final name.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name

    def __enter__(self) -> pa.NativeFile:
        self.stream = pa.BufferOutputStream()
        return self.stream

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.storage._upload(self.name, self.stream.getvalue())


class _Rename:
    """A local file beside its final place, renamed when the ``with`` block ends without an exception."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.final = Path(storage.path(name))
        self.temporary = self.final.with_name(f".{self.final.name}.{uuid.uuid4().hex}.tmp")

    def __enter__(self) -> pa.NativeFile:
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.stream = pa.OSFile(str(self.temporary), "wb")
        return self.stream

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.stream.close()
            if kind is None:
                _to_disk(self.temporary)
                os.replace(self.temporary, self.final)
                _to_disk(self.final.parent)  # the name as well, so that no later file survives a crash without it
        finally:
            self.temporary.unlink(missing_ok=True)


def _with_known_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict whose keys are the strings of all others: of 100,000 footers they would take more than the numbers."""
    return {sys.intern(key): value for key, value in pairs}


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

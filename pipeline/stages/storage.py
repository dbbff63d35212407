"""Files of a run directory, on a local disk or an object store, complete under their final name or absent."""

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from data_schemas import check

FINGERPRINT_KEY = b"alphatoken.fingerprint"
ROWS_PER_GROUP = 2048


class Storage:
    """A directory tree addressed by relative names with forward slashes.

    ``root`` is a local path or a URI that pyarrow.fs understands (``file://``, ``s3://``, ``gs://``). On a local disk
    a file is written beside its final place, flushed to the disk and renamed; an object store commits an upload as
    a whole when it is closed. Instances can be pickled.
    """

    def __init__(self, root: str) -> None:
        if "://" in root:
            self.fs, self.root = pafs.FileSystem.from_uri(root)
        else:
            self.fs, self.root = pafs.LocalFileSystem(), str(Path(root).expanduser().resolve())
        self.local = isinstance(self.fs, pafs.LocalFileSystem)

    def path(self, name: str) -> str:
        """The path of ``name`` within the file system."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str) -> bool:
        """Whether a file or directory of that name is there."""
        return self.fs.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def names(self, directory: str) -> list[str]:
        """Sorted relative names of the files directly below ``directory``."""
        selector = pafs.FileSelector(self.path(directory), allow_not_found=True)
        files = [info.base_name for info in self.fs.get_file_info(selector) if info.type == pafs.FileType.File]
        return sorted(f"{directory}/{name}" for name in files if not name.startswith("."))

    def remove(self, name: str) -> None:
        """Remove a file or a whole directory; absent ones are fine."""
        kind = self.fs.get_file_info(self.path(name)).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(self.path(name))
        elif kind == pafs.FileType.File:
            self.fs.delete_file(self.path(name))

    def read_bytes(self, name: str) -> bytes:
        """The content of a file."""
        with self.fs.open_input_stream(self.path(name)) as stream:
            return stream.read()

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        """Write a file; it appears under its name only when it is complete."""
        with _Commit(self, name) as stream:
            stream.write(content)

    def read_json(self, name: str) -> Any:
        """The JSON value in a file."""
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON value, indented, keys in the order given."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def write_table(self, name: str, table: pa.Table, fingerprint: str) -> None:
        """Write a Parquet part with the fingerprint of the stage that made it."""
        with self.table_writer(name, table.schema, fingerprint) as part:
            part.write(table)

    @contextmanager
    def table_writer(self, name: str, schema: pa.Schema, fingerprint: str) -> Iterator["PartWriter"]:
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
        with (
            _Commit(self, name) as stream,
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

    def rows_of(self, name: str, fingerprint: str) -> int | None:
        """The row count of a complete part that carries ``fingerprint``; None where it has to be written (again)."""
        if not self.exists(name):
            return None
        try:
            with pq.ParquetFile(self.path(name), filesystem=self.fs) as file:
                if (file.schema_arrow.metadata or {}).get(FINGERPRINT_KEY) != fingerprint.encode():
                    return None
                return file.metadata.num_rows
        except (pa.ArrowInvalid, OSError):
            return None


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


class _Commit:
    """An output stream whose file takes its final name only when the ``with`` block ends without an exception."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.final = storage, storage.path(name)
        directory, _, base = self.final.rpartition("/")
        self.directory = directory
        self.temporary = f"{directory}/.{base}.{uuid.uuid4().hex}.tmp" if storage.local else self.final

    def __enter__(self) -> pa.NativeFile:
        if self.storage.local:
            self.storage.fs.create_dir(self.directory, recursive=True)
        self.stream = self.storage.fs.open_output_stream(self.temporary)
        return self.stream

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Arrow's upload streams commit what they have when they are dropped, so that a failed one has to be taken back.
        self.stream.close()
        if kind is not None:
            self.storage.fs.delete_file(self.temporary)
        elif self.storage.local:
            descriptor = os.open(self.temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(self.temporary, self.final)

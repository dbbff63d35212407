"""Files of a run directory, on a local disk or an object store, complete under their final name or absent."""

import json
import os
import uuid
from collections.abc import Iterator
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
        """Write a Parquet part with the fingerprint of the stage that made it.

        zstd level 3, byte-stream-split for floats, dictionaries only for strings, page index on.
        """
        metadata = {**(table.schema.metadata or {}), FINGERPRINT_KEY: fingerprint.encode()}
        table = table.replace_schema_metadata(metadata)
        strings = [field.name for field in table.schema if pa.types.is_string(field.type)]
        floats = [
            f"{field.name}.list.element"
            for field in table.schema
            if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)
        ]
        with _Commit(self, name) as stream:
            pq.write_table(
                table,
                stream,
                row_group_size=ROWS_PER_GROUP,
                compression="zstd",
                compression_level=3,
                use_dictionary=strings or False,
                use_byte_stream_split=floats or False,
                write_page_index=True,
            )

    def read_table(self, name: str, schema: pa.Schema) -> pa.Table:
        """Read a whole Parquet part; raises SchemaMismatch when it has not the schema expected."""
        with pq.ParquetFile(self.path(name), filesystem=self.fs) as file:
            check(file.schema_arrow, schema, name)
            return file.read()

    def read_batches(self, name: str, schema: pa.Schema, rows: int = ROWS_PER_GROUP) -> Iterator[pa.RecordBatch]:
        """Read a Parquet part some rows at a time, for passes whose memory must not grow with the part."""
        with pq.ParquetFile(self.path(name), filesystem=self.fs) as file:
            check(file.schema_arrow, schema, name)
            yield from file.iter_batches(batch_size=rows)

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
        if kind is not None and not self.storage.local:
            return  # an upload that is never closed is never committed
        self.stream.close()
        if kind is not None:
            os.unlink(self.temporary)
        elif self.storage.local:
            descriptor = os.open(self.temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(self.temporary, self.final)

"""Exports that are tables: a folder of Parquet, or one file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq

from alphatoken.pipeline.run.storage import PartWriter
from alphatoken.pipeline.trainers.source import MaskSource
from alphatoken.pipeline.trainers.written import Shard


def write_parquet(shards: Iterator[Shard], source: MaskSource, out: Path) -> None:
    """A folder with nothing but Parquet, one file per shard of the mask and of the same name."""
    out.mkdir()
    for shard in shards:
        first = next(shard.tables, None)
        if first is None:
            continue  # an empty shard leaves no file: `datasets` cannot read one without row groups
        with pq.ParquetWriter(out / shard.name, first.schema, compression="zstd") as writer:
            groups = PartWriter(writer, first.schema)
            for table in chain([first], shard.tables):
                groups.write(table)
            groups.flush()


def write_jsonl(shards: Iterator[Shard], source: MaskSource, out: Path) -> None:
    """One file, one row a line."""
    with out.open("w", encoding="utf-8") as file:
        for shard in shards:
            for table in shard.tables:
                file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in table.to_pylist())

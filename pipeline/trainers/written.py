"""What a writer of a format is given: shards, each with its tables in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Shard:
    """``name``: of the mask's file, ``train-00000-of-00012.parquet``. ``tables``: can be gone through once."""

    name: str
    tables: Iterator[pa.Table]

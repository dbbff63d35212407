"""`datasets.load_from_disk` reads it: one plain data set, not a dictionary of splits, which ms-swift does not take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from alphatoken.pipeline.trainers.source import MaskSource
from alphatoken.pipeline.trainers.written import Shard


def write_hf(shards: Iterator[Shard], source: MaskSource, out: Path) -> None:
    """Shards become Arrow files beside ``out``, which `datasets` maps into memory and saves in its own layout."""
    from datasets import Dataset, concatenate_datasets

    with TemporaryDirectory(prefix=".arrow-", dir=out.parent) as place:
        made = []
        for shard in shards:
            file = Path(place) / f"{shard.name}.arrow"
            writer = None
            for table in shard.tables:
                writer = writer or pa.ipc.new_stream(str(file), table.schema)
                writer.write_table(table)
            if writer:
                writer.close()
                made.append(Dataset.from_file(str(file)))
        concatenate_datasets(made).save_to_disk(str(out))

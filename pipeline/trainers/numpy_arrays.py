"""OLMo-core's own layout: raw arrays without a header, all rows of a shard end to end, and a list of where they end.

    token_ids_part_00000.npy      token ids, uint16 where the vocabulary allows it, else uint32
    labels_mask_part_00000.npy    bool, true where the token is in the loss; entry i speaks of token i
    token_ids_part_00000.csv.gz   `start,end` of every row

It finds rows by the end-of-sequence id unless it is told `use_array_if_local=False`; a row that was cut has no such id,
and would grow together with the next one.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alphatoken.pipeline.trainers.columns import list_offsets
from alphatoken.pipeline.trainers.source import MaskSource
from alphatoken.pipeline.trainers.written import Shard


def id_type(source: MaskSource) -> type[np.uint16] | type[np.uint32]:
    """The type of token ids: that which OLMo-core chooses for the vocabulary."""
    return (
        np.uint16 if source.vocabulary is not None and source.vocabulary - 1 <= np.iinfo(np.uint16).max else np.uint32
    )


def write_olmo(shards: Iterator[Shard], source: MaskSource, out: Path) -> None:
    """The three files of every shard that has rows."""
    out.mkdir()
    dtype = id_type(source)
    for number, shard in enumerate(shards):
        ids = out / f"token_ids_part_{number:05d}.npy"
        start = 0
        with (
            ids.open("wb") as tokens,
            (out / f"labels_mask_part_{number:05d}.npy").open("wb") as kept,
            gzip.GzipFile(ids.with_suffix(".csv.gz"), "wb", mtime=0) as ends,  # no time: the same rows, the same bytes
        ):
            for table in shard.tables:
                batch = table.combine_chunks()
                column = batch["input_ids"].chunk(0)
                tokens.write(column.flatten().to_numpy().astype(dtype).tobytes())
                kept.write(batch["loss_mask"].chunk(0).flatten().to_numpy().astype(np.bool_).tobytes())
                borders = list_offsets(column).astype(np.int64) + start
                ends.write("".join(f"{a},{b}\n" for a, b in zip(borders[:-1], borders[1:], strict=True)).encode())
                start = int(borders[-1])
        if not start:
            for left in (ids, ids.with_suffix(".csv.gz"), out / f"labels_mask_part_{number:05d}.npy"):
                left.unlink()

"""Writing masks of supervised data, part by part; those that are made together from one reading of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pyarrow as pa

from alphatoken.pipeline.mask.layout import mask_part
from alphatoken.pipeline.mask.paired_rows import PairedParts, PairedRows
from alphatoken.pipeline.mask.worker import Tally, Written, in_parallel, mask_columns
from alphatoken.pipeline.run.storage import PartWriter, Storage


def write_supervised_part(
    storage: Storage,
    own: PairedParts,
    part: str,
    masks: Sequence[Written],
    columns: Sequence[str],
    tallies: Sequence[Tally],
    advance: Callable[[int], None],
    threads: int,
) -> None:
    """Decide every row of a part for every mask, and write it for those that have not got it yet.

    ``columns``: to read. ``tallies``: of the masks, to count in. ``threads``: masks at once.
    """
    with ExitStack() as stack:
        files: list[PartWriter | None] = []
        for mask in masks:
            place = mask_part(mask.name, part)
            complete = storage.rows_of(place, mask.fingerprint) == own.rows[part]
            files.append(
                None if complete else stack.enter_context(storage.table_writer(place, mask.schema, mask.fingerprint))
            )

        def decide(rows: PairedRows, index: int) -> None:
            mask, file = masks[index], files[index]
            kept, weights = mask.deciders[""].decide(rows, tallies[index])
            if file is not None:
                made = mask_columns(rows, kept, weights, mask.schema.names)
                file.write(pa.Table.from_arrays(made, schema=mask.schema))

        each = stack.enter_context(in_parallel(threads, len(masks)))
        for rows in own.part(part, columns, with_input_ids=True):
            each(lambda index, rows=rows: decide(rows, index))  # type: ignore[misc]  # bound now: rows change
            advance(len(rows))

"""Writing the masks of supervised data, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import pyarrow as pa

from alphatoken.pipeline.mask.inputs import MaskInputs
from alphatoken.pipeline.mask.layout import mask_part
from alphatoken.pipeline.mask.passes import Passes
from alphatoken.pipeline.mask.worker import Decider, mask_columns
from alphatoken.pipeline.run.run import Run


def write_supervised(
    run: Run,
    passes: Mapping[str, Passes],
    deciders: Mapping[str, Decider],
    name: str,
    inputs: MaskInputs,
    fingerprint: str,
) -> None:
    """Decide every row, and write every part that is not complete yet.

    ``passes``, ``deciders``: under an empty branch; ``name``: of the mask.
    """
    own, decider, schema = passes[""], deciders[""], inputs.schema
    columns = tuple(dict.fromkeys((*inputs.columns, *own.columns)))
    with own.task("write") as task:
        for part, expected in own.parts.rows.items():
            place = mask_part(name, part)
            complete = run.storage.rows_of(place, fingerprint) == expected
            file = nullcontext() if complete else run.storage.table_writer(place, schema, fingerprint)
            with file as out:
                for rows in own.parts.part(part, columns, with_input_ids=True):
                    kept, weights = decider.decide(rows)
                    if out is not None:
                        made = mask_columns(rows, kept, weights, schema.names)
                        out.write(pa.Table.from_arrays(made, schema=schema))
                    task.advance(len(rows))

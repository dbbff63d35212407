"""Writing the masks of preference pairs: both branches, each with its own threshold, side by side.

A branch is decided as supervised data is; what is added are the texts and the reference's log-probabilities, summed
over the kept tokens and over all response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa

from alphatoken.data_schemas import BRANCHES, PREFERENCE_PREPARED, PREFERENCE_REFERENCE
from alphatoken.pipeline.mask.inputs import MaskInputs
from alphatoken.pipeline.mask.layout import mask_part
from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.mask.passes import Passes
from alphatoken.pipeline.mask.worker import Decider, mask_columns
from alphatoken.pipeline.maths.masking import sums_by_row
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.run import Run

TEXTS = ("prompt", *BRANCHES)


def write_pairs(
    run: Run,
    passes: Mapping[str, Passes],
    deciders: Mapping[str, Decider],
    name: str,
    inputs: MaskInputs,
    fingerprint: str,
) -> None:
    """Decide every row, and write every part that is not complete yet; ``passes``, ``deciders``: by branch; ``name``: of the mask.

    Raises RunFailed for a part of reference/ that is missing, damaged or does not belong to the others.
    """
    parts, schema, storage = {branch: passes[branch].parts for branch in BRANCHES}, inputs.schema, run.storage
    first = parts[BRANCHES[0]]
    reference = run.manifest.stage("value")["counts"]["reference_fingerprint"]
    columns = {b: tuple(dict.fromkeys((*inputs.columns, *passes[b].columns))) for b in BRANCHES}
    with passes[BRANCHES[0]].task("write") as task:
        for part, expected in first.rows.items():
            if storage.rows_of(f"reference/{part}", reference) != expected:
                raise _damaged(part, "is missing, damaged or of another run")
            place = mask_part(name, part)
            complete = storage.rows_of(place, fingerprint) == expected
            sides = [parts[b].part(part, columns[b], with_input_ids=True) for b in BRANCHES]
            texts = first.tables(f"prepared/{part}", PREFERENCE_PREPARED, ["id", *TEXTS], "prepare")
            logps = [
                parts[b].tables(f"reference/{part}", PREFERENCE_REFERENCE, ["id", "logps"], "value") for b in BRANCHES
            ]
            file = nullcontext() if complete else storage.table_writer(place, schema, fingerprint)
            with file as out:
                for chosen, rejected, text, *stored in zip(*sides, texts, *logps, strict=True):
                    made = {column: text[column] for column in TEXTS}
                    for branch, rows, theirs in zip(BRANCHES, (chosen, rejected), stored, strict=True):
                        if theirs["id"] != text["id"]:
                            raise _damaged(part, "has other ids than prepared/")
                        made |= _branch(branch, deciders[branch], rows, theirs["logps"], schema, part)
                    if out is not None:
                        out.write(pa.table([made[column] for column in schema.names], schema=schema))
                    task.advance(len(chosen))


def _branch(
    branch: str, decider: Decider, rows: PairedRows, logps: pa.ChunkedArray, schema: pa.Schema, part: str
) -> dict[str, Any]:
    """The columns of one branch; its decisions are counted."""
    kept, weights = decider.decide(rows)
    names = [name.removeprefix(f"{branch}_") for name in schema.names if name.startswith(f"{branch}_")]
    columns = dict(zip((f"{branch}_{n}" for n in names), mask_columns(rows, kept, weights, names), strict=True))
    theirs = logps.combine_chunks()
    starts = theirs.offsets.to_numpy()
    if not np.array_equal(starts - starts[0], rows.token_offsets()):
        raise _damaged(part, f"has {branch}_logps that are not as long as labels")
    flat = theirs.flatten().to_numpy().astype(np.float64)
    for over, which in (("", kept), ("_all", rows.response)):
        summed = sums_by_row(np.where(which, flat, 0.0), rows.token_offsets())
        columns[f"ref_{branch}_logps{over}"] = pa.array(summed.astype(np.float32))
    return columns


def _damaged(part: str, reason: str) -> RunFailed:
    return RunFailed(f"reference/{part} {reason}: make it anew with run.overwrite=value")

"""Writing the masks of preference pairs: both branches, each with its own threshold, side by side.

A branch is decided as supervised data is; what is added are the texts and the reference's log-probabilities, summed
over the kept tokens and over all response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alphatoken.data_schemas import BRANCHES, PREFERENCE_PREPARED, PREFERENCE_REFERENCE
from alphatoken.pipeline.mask.layout import mask_part
from alphatoken.pipeline.mask.paired_rows import PairedParts, PairedRows, damaged, unfinished
from alphatoken.pipeline.mask.worker import Tally, Written, mask_columns
from alphatoken.pipeline.maths.masking import sums_by_row
from alphatoken.pipeline.run.storage import PartWriter, Storage

TEXTS = ("prompt", *BRANCHES)


def write_pairs_part(
    storage: Storage,
    parts: Mapping[str, PairedParts],
    part: str,
    masks: Sequence[Written],
    columns: Mapping[str, Sequence[str]],
    reference: str,
    tallies: Sequence[Mapping[str, Tally]],
    advance: Callable[[int], None],
) -> None:
    """Decide every row of a part for every mask, and write it for those that have not got it yet.

    ``parts``, ``columns``: by branch. ``reference``: the fingerprint of reference/. ``tallies``: of the masks, by branch, to count
    in. Raises RunFailed for a part of reference/ that is missing, damaged or does not belong to the others.
    """
    first = parts[BRANCHES[0]]
    expected = first.rows[part]
    if storage.rows_of(f"reference/{part}", reference) != expected:
        raise unfinished(storage.place, "value", f"reference/{part}")
    sides = [parts[b].part(part, columns[b], with_input_ids=True) for b in BRANCHES]
    texts = first.tables(f"prepared/{part}", PREFERENCE_PREPARED, ["id", *TEXTS], "prepare")
    logps = [parts[b].tables(f"reference/{part}", PREFERENCE_REFERENCE, ["id", "logps"], "value") for b in BRANCHES]
    with ExitStack() as stack:
        files: list[PartWriter | None] = []
        for mask in masks:
            place = mask_part(mask.name, part)
            complete = storage.rows_of(place, mask.fingerprint) == expected
            files.append(
                None if complete else stack.enter_context(storage.table_writer(place, mask.schema, mask.fingerprint))
            )
        for chosen, rejected, text, *stored in zip(*sides, texts, *logps, strict=True):
            if any(theirs["id"] != text["id"] for theirs in stored):
                raise damaged(storage.place, "value", f"reference/{part}", "has other ids than prepared/")
            for branch, rows, theirs in zip(BRANCHES, (chosen, rejected), stored, strict=True):
                if not np.array_equal(_starts(theirs["logps"].combine_chunks()), rows.token_offsets()):
                    reason = f"has {branch}_logps that are not as long as labels"
                    raise damaged(storage.place, "value", f"reference/{part}", reason)
            for mask, file, tally in zip(masks, files, tallies, strict=True):
                made = {column: text[column] for column in TEXTS}
                for branch, rows, theirs in zip(BRANCHES, (chosen, rejected), stored, strict=True):
                    made |= _branch(branch, mask, rows, theirs["logps"], tally[branch])
                if file is not None:
                    file.write(pa.table([made[column] for column in mask.schema.names], schema=mask.schema))
            advance(len(chosen))


def _branch(branch: str, mask: Written, rows: PairedRows, logps: pa.ChunkedArray, tally: Tally) -> dict[str, Any]:
    """The columns of one branch; its decisions are counted."""
    kept, weights = mask.deciders[branch].decide(rows, tally)
    names = [name.removeprefix(f"{branch}_") for name in mask.schema.names if name.startswith(f"{branch}_")]
    columns = dict(zip((f"{branch}_{n}" for n in names), mask_columns(rows, kept, weights, names), strict=True))
    flat = logps.combine_chunks().flatten().to_numpy().astype(np.float64)
    for over, which in (("", kept), ("_all", rows.response)):
        summed = sums_by_row(np.where(which, flat, 0.0), rows.token_offsets())
        columns[f"ref_{branch}_logps{over}"] = pa.array(summed.astype(np.float32))
    return columns


def _starts(column: pa.ListArray) -> npt.NDArray[np.int32]:
    starts = column.offsets.to_numpy()
    return starts - starts[0]

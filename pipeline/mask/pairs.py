"""mask, for preference pairs: both branches, each with its own threshold, written side by side.

A branch is decided as supervised data is; what is added are the texts and the reference's log-probabilities, summed
over the kept tokens and over all response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
from alphatoken.data_schemas import BRANCHES, PREFERENCE_PREPARED, PREFERENCE_REFERENCE
from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.mask.stage import Masking, mask_columns
from alphatoken.pipeline.maths.masking import sums_by_row
from alphatoken.pipeline.run.failure import RunFailed

TEXTS = ("prompt", *BRANCHES)


def write_pairs(
    works: Sequence[Masking], values: Mapping[str, Any], place: str, schema: pa.Schema, fingerprint: str
) -> dict[str, Any]:
    """Write every part that is not complete yet; returns the summary.

    ``works``: of the chosen and the rejected branch, thresholds found. ``values``: the record of that stage. Raises
    RunFailed for a part of reference/ that is missing, damaged or does not belong to the others.
    """
    first = works[0]
    reference = values["counts"]["reference_fingerprint"]
    with first.task("write", 1) as task:
        for part, expected in first.parts.rows.items():
            if first.storage.rows_of(f"reference/{part}", reference) != expected:
                raise _damaged(part, "is missing, damaged or of another run")
            name = f"{place}/{part.replace('part-', 'train-', 1)}"
            complete = first.storage.rows_of(name, fingerprint) == expected
            sides = [work.parts.part(part, with_input_ids=True) for work in works]
            texts = first.parts.tables(f"prepared/{part}", PREFERENCE_PREPARED, ["id", *TEXTS], "prepare")
            logps = [w.parts.tables(f"reference/{part}", PREFERENCE_REFERENCE, ["id", "logps"], "value") for w in works]
            file = nullcontext() if complete else first.storage.table_writer(name, schema, fingerprint)
            with file as out:
                for chosen, rejected, text, *stored in zip(*sides, texts, *logps, strict=True):
                    columns = {name: text[name] for name in TEXTS}
                    for branch, work, rows, theirs in zip(BRANCHES, works, (chosen, rejected), stored, strict=True):
                        if theirs["id"] != text["id"]:
                            raise _damaged(part, "has other ids than prepared/")
                        columns |= _branch(branch, work, rows, theirs["logps"], schema, part)
                    if out is not None:
                        out.write(pa.table([columns[name] for name in schema.names], schema=schema))
                    task.advance(len(chosen))
    return _summary(dict(zip(BRANCHES, (work.summary() for work in works), strict=True)))


def _branch(
    branch: str, work: Masking, rows: PairedRows, logps: pa.ChunkedArray, schema: pa.Schema, part: str
) -> dict[str, Any]:
    """The columns of one branch; its decisions are counted."""
    kept, weights = work.decide(rows)
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


def _summary(branches: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Both branches' summaries, and sums over them under the names that a supervised summary has."""
    chosen = branches["chosen"]
    tokens, kept = (sum(b[name] for b in branches.values()) for name in ("response_tokens", "kept_tokens"))
    soft = [(b["loss_weight"], b["response_tokens"]) for b in branches.values() if b["loss_weight"]]
    shared = ("name", "method", "estimator", "settings", "always_keep_ids")
    return {
        "format": "preference",
        **{name: chosen[name] for name in shared},
        "rows": chosen["rows"],
        "response_tokens": tokens,
        "kept_tokens": kept,
        "kept_fraction": kept / tokens,
        "loss_weight": {"mean": sum(w["mean"] * n for w, n in soft) / tokens} if soft else None,
        "branches": {
            branch: {key: value for key, value in found.items() if key not in shared}
            for branch, found in branches.items()
        },
        "notes": [f"{branch}: {note}" for branch, found in branches.items() for note in found["notes"]],
    }


def _damaged(part: str, reason: str) -> RunFailed:
    return RunFailed(f"reference/{part} {reason}: make it anew with run.overwrite=value")

"""What later stages read of prepared/."""

from __future__ import annotations

import pyarrow as pa

from alphatoken.data_schemas import BRANCHES, PREPARED
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.prepare.held_out import RETENTION
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.noted import Footer
from alphatoken.pipeline.run.remedies import again
from alphatoken.pipeline.run.run import Run


def prepared_parts(run: Run) -> dict[str, Footer]:
    """Part -> its rows and counts (``tokens``: of pairs of both branches), in the order of the parts.

    Raises RunFailed for one that is missing or damaged.
    """
    prepared = run.manifest.stage("prepare")
    parts = prepared["counts"]["parts"]
    found = run.storage.footers("prepared", parts, prepared["fingerprint"])
    for part in parts:
        if part not in found:
            raise RunFailed(f"prepared/{part} is missing or damaged: {again(run.storage.place, 'prepare')}")
    return found


def prepared_rows(run: Run) -> dict[str, int]:
    """Part -> rows, in the order of the parts; raises RunFailed for one that is missing or damaged."""
    return {part: footer.rows for part, footer in prepared_parts(run).items()}


def sequences_of(table: pa.Table) -> Sequences:
    """A prepared table of supervised data."""
    return Sequences(*(table.column(name).to_pylist() for name in ("id", "input_ids", "labels")))


def validation_rows(run: Run) -> dict[str, Sequences]:
    """Task -> the validation rows that make its direction, in the order of data.validation; one task without a name where
    it has none. Raises RunFailed for a task of which no row can be used."""
    table = run.storage.read_table("prepared/validation.parquet", PREPARED)
    tasks = run.manifest.stage("prepare")["counts"].get("validation_tasks")
    if not tasks:
        return {"": sequences_of(table)}
    files = [source.rpartition(":")[0] for source in table.column("source").to_pylist()]
    found = {}
    for task, own in tasks.items():
        mine = [row for row, file in enumerate(files) if file in own]
        if not mine:
            raise RunFailed(f"data.validation.{task}: no row of {', '.join(own)} has a response token: give other rows")
        found[task] = sequences_of(table.take(mine))
    return found


def retention_rows(run: Run) -> Sequences | None:
    """The rows of data.retention; None where there are none. Raises RunFailed where the file is missing or damaged."""
    prepared = run.manifest.stage("prepare")
    if not prepared["counts"].get(f"{RETENTION}_rows"):
        return None
    name = f"prepared/{RETENTION}.parquet"
    if run.storage.rows_of(name, prepared["fingerprint"]) is None:
        raise RunFailed(f"{name} is missing or damaged: {again(run.storage.place, 'prepare')}")
    return sequences_of(run.storage.read_table(name, PREPARED))


def branches_of(table: pa.Table) -> Sequences:
    """A prepared table of pairs: all chosen branches, then all rejected ones."""
    ids = [f"{name} ({branch})" for branch in BRANCHES for name in table.column("id").to_pylist()]
    columns = ([row for b in BRANCHES for row in table.column(f"{b}_{n}").to_pylist()] for n in ("input_ids", "labels"))
    return Sequences(ids, *columns)

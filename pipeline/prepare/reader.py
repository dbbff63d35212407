"""What later stages read of prepared/."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from alphatoken.data_schemas import BRANCHES, PREFERENCE_PREPARED, PREPARED
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.prepare.held_out import RETENTION
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage


def prepared_rows(run: Run) -> dict[str, int]:
    """Part -> rows, in the order of the parts; raises RunFailed for one that is missing or damaged."""
    prepared, found = run.manifest.stage("prepare"), {}
    for part in prepared["counts"]["parts"]:
        count = run.storage.rows_of(f"prepared/{part}", prepared["fingerprint"])
        if count is None:
            raise RunFailed(f"prepared/{part} is missing or damaged: run `alphatoken prepare` again")
        found[part] = count
    return found


def sequences_of(table: pa.Table) -> Sequences:
    """A prepared table of supervised data."""
    return Sequences(*(table.column(name).to_pylist() for name in ("id", "input_ids", "labels")))


def retention_rows(run: Run) -> Sequences | None:
    """The rows of data.retention; None where there are none. Raises RunFailed where the file is missing or damaged."""
    prepared = run.manifest.stage("prepare")
    if not prepared["counts"].get(f"{RETENTION}_rows"):
        return None
    name = f"prepared/{RETENTION}.parquet"
    if run.storage.rows_of(name, prepared["fingerprint"]) is None:
        raise RunFailed(f"{name} is missing or damaged: run `alphatoken prepare` again")
    return sequences_of(run.storage.read_table(name, PREPARED))


def branches_of(table: pa.Table) -> Sequences:
    """A prepared table of pairs: all chosen branches, then all rejected ones."""
    ids = [f"{name} ({branch})" for branch in BRANCHES for name in table.column("id").to_pylist()]
    columns = ([row for b in BRANCHES for row in table.column(f"{b}_{n}").to_pylist()] for n in ("input_ids", "labels"))
    return Sequences(ids, *columns)


def tokens_of(storage: Storage, part: str, pairs: bool) -> int:
    """Tokens of a prepared part, of pairs of both branches."""
    names: Sequence[str] = [f"{branch}_input_ids" for branch in BRANCHES] if pairs else ["input_ids"]
    schema = PREFERENCE_PREPARED if pairs else PREPARED
    batches = storage.read_batches(f"prepared/{part}", schema, columns=names)
    return sum(len(batch.column(name).flatten()) for batch in batches for name in names)

"""The reference's pass over the shards of preference pairs: a forward alone, its log-probabilities in reference/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from alphatoken.data_schemas import BRANCHES, PREFERENCE_PREPARED, PREFERENCE_REFERENCE
from alphatoken.pipeline.cluster.batched_worker import BatchedWorker, as_lists
from alphatoken.pipeline.cluster.shard_loop import Shard
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.models import ModelSource, load_model
from alphatoken.pipeline.maths.selectors.forward import losses_and_entropies
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

LOGPS = "logps"


@dataclass(frozen=True, slots=True)
class _Task:
    """One shard: the part's file name, and the fingerprint that its file carries."""

    part: str
    fingerprint: str


class ReferenceWorker(BatchedWorker):
    """Holds the reference model alone."""

    columns = (LOGPS,)

    def __init__(self, storage: Storage, source: ModelSource, settings: Settings) -> None:
        super().__init__(settings)
        self.storage, self.kernel = storage, settings.model.attention
        self.model = load_model(here(source), self.device)

    def __call__(self, task: _Task, advance: Callable[[int], None]) -> dict[str, int]:
        """Write one part of reference/; returns counts."""
        table = self.storage.read_table(f"prepared/{task.part}", PREFERENCE_PREPARED)
        ids, input_ids, labels = branches_as_sequences(table)
        columns, _ = self.score(ids, input_ids, labels, advance)
        logps = dict(zip(BRANCHES, halves(columns[LOGPS]), strict=True))
        write_reference(self.storage, task.part, table.column("id"), logps, task.fingerprint)
        return {"rows": table.num_rows, "tokens": sum(len(row) for row in input_ids)}

    def _values(self, batch: Batch, ids: list[str]) -> dict[str, np.ndarray]:
        return {LOGPS: 0.0 - losses_and_entropies(self.model, batch, self.kernel)[0].cpu().numpy()}


def branches_as_sequences(table: pa.Table) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """Names for messages, input_ids and labels of all chosen branches, then of all rejected ones."""
    ids = [f"{name} ({branch})" for branch in BRANCHES for name in table.column("id").to_pylist()]
    input_ids = [row for branch in BRANCHES for row in table.column(f"{branch}_input_ids").to_pylist()]
    return ids, input_ids, [row for branch in BRANCHES for row in table.column(f"{branch}_labels").to_pylist()]


def halves(rows: Sequence[np.ndarray]) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
    """What belongs to the chosen branches and to the rejected ones, of one entry per sequence."""
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def write_reference(
    storage: Storage,
    part: str,
    ids: pa.ChunkedArray,
    logps: Mapping[str, Sequence[np.ndarray]],
    fingerprint: str,
) -> None:
    """Write reference/<part>: branch -> one array (length,) per pair."""
    columns = [ids, *[as_lists(logps[branch]) for branch in BRANCHES]]
    storage.write_table(f"reference/{part}", pa.table(columns, schema=PREFERENCE_REFERENCE), fingerprint)


def run_reference(run: Run, fingerprint: str) -> dict[str, int]:
    """Write every part of reference/ that is not complete yet; returns what this call computed.

    ``fingerprint``: what its files carry.
    """
    storage, prepared = run.storage, run.manifest.stage("prepare")
    rows = {p: storage.rows_of(f"prepared/{p}", prepared["fingerprint"]) for p in prepared["counts"]["parts"]}
    missing = [part for part in rows if storage.rows_of(f"reference/{part}", fingerprint) != rows[part]]
    counts = {"rows": 0, "tokens": 0}
    if not missing:
        return counts
    tokens = {part: tokens_of(storage, part) for part in missing}
    own, cluster = run.settings.model, run.cluster
    source = ModelSource(run.models.reference, own.revision, own.dtype, own.trust_remote_code)
    arguments = {"storage": storage, "source": source, "settings": run.settings}

    def done(shard: Shard, result: dict[str, int]) -> None:
        for key in counts:
            counts[key] += result[key]

    with (
        cluster.pool(logged("reference", ReferenceWorker), arguments, cluster.model_resources()) as pool,
        run.progress.task("value: reference", sum(tokens.values()), "tokens") as task,
    ):
        pool.run([Shard(p, n) for p, n in tokens.items()], lambda s: _Task(s.name, fingerprint), done, task)
    return counts


def tokens_of(storage: Storage, part: str) -> int:
    """Tokens of both branches of a prepared part."""
    names = [f"{branch}_input_ids" for branch in BRANCHES]
    batches = storage.read_batches(f"prepared/{part}", PREFERENCE_PREPARED, columns=names)
    return sum(len(batch.column(name).flatten()) for batch in batches for name in names)

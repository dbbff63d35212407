"""What retention is measured on: completions that the reference itself samples after prompts that nothing is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from alphatoken.data_schemas import PREPARED
from alphatoken.pipeline.anchor.loading import held_model
from alphatoken.pipeline.cluster.work import Shard
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.maths.batch import Sequences, response_start
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.sampling import sample_completions
from alphatoken.pipeline.prepare.reader import sequences_of
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

COMPLETIONS = "trial/completions.parquet"
PROMPTS_PER_BATCH = 16


@dataclass(frozen=True, slots=True)
class CompletionTask:
    """Rows whose prompts are completed, into the file ``output``."""

    rows: Sequences
    seed: int
    output: str
    fingerprint: str


class CompletionWorker:
    """Holds the reference and samples from it."""

    def __init__(self, storage: Storage, source: ModelSource, settings: Settings, eos: Sequence[int]) -> None:
        self.storage, self.fisher, self.eos = storage, settings.anchor.fisher, eos
        self.model = held_model(source, settings, "model.reference")

    def __call__(self, task: CompletionTask, advance: Callable[[int], None]) -> None:
        """Write prompts with completions as a prepared table, in the order of the rows."""
        torch.manual_seed(task.seed)
        starts = [response_start(labels) for labels in task.rows.labels]
        order = sorted(range(len(task.rows)), key=lambda i: (-starts[i], i))
        made: dict[int, dict[str, Any]] = {}
        for begin in range(0, len(order), PROMPTS_PER_BATCH):
            rows = order[begin : begin + PROMPTS_PER_BATCH]
            prompts = [task.rows.input_ids[i][: starts[i]] for i in rows]
            batch = sample_completions(
                self.model, prompts, self.fisher.max_new_tokens, self.fisher.temperature, self.eos
            )
            for place, row in enumerate(rows):
                length, name = int(batch.lengths[place]), task.rows.ids[row]
                ids, labels = (part[place, :length].tolist() for part in (batch.input_ids, batch.labels))
                made[row] = {"id": name, "input_ids": ids, "labels": labels, "source": f"completion of {name}"}
            advance(len(rows))
        table = pa.Table.from_pylist([made[row] for row in range(len(made))], PREPARED)
        self.storage.write_table(task.output, table, task.fingerprint)


def make_completions(run: Run, rows: Sequences, fingerprint: str) -> Sequences:
    """The completions, sampled where they are not there yet."""
    if run.storage.rows_of(COMPLETIONS, fingerprint) is None:
        own, counts = run.settings.model, run.manifest.stage("prepare")["counts"]
        source = ModelSource(run.models.reference, own.revision, own.dtype, own.trust_remote_code)
        arguments = {
            "storage": run.storage, "source": source, "settings": run.settings, "eos": counts["eos_token_ids"],
        }  # fmt: skip
        work = CompletionTask(rows, run.settings.run.seed, COMPLETIONS, fingerprint)
        resources = run.cluster.model_resources()
        with (
            run.cluster.pool(logged("trial", CompletionWorker), arguments, resources) as pool,
            run.progress.task("trial: completions of the reference", len(rows), "prompts") as task,
        ):
            pool.run([Shard("completions", len(rows))], lambda s: work, lambda s, r: None, task)
    return sequences_of(run.storage.read_table(COMPLETIONS, PREPARED))

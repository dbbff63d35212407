"""value: the components and the loss of every response token, one sidecar part per prepared part.

The only stage over the whole data set with the model. Batches are formed within a shard from length-sorted rows by a
token budget, so values do not depend on the number of workers; while one shard computes, the next is read and the last
is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from alphatoken.data_schemas import COMPONENTS, GRADIENT_NORM, PREPARED, REHEARSED_VALUES, VALUES, values_schema
from alphatoken.pipeline.anchor.coverage import checked_layers
from alphatoken.pipeline.anchor.tensors import read_tensors
from alphatoken.pipeline.cluster.batched_worker import BatchedWorker, as_lists
from alphatoken.pipeline.cluster.host import Resources
from alphatoken.pipeline.cluster.shard_loop import Shard
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.maths.decoder import UnsupportedModel
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.models import ModelSource, load_model
from alphatoken.pipeline.maths.valuer import TokenValuer
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.fingerprint import of_policy
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.value.reference import tokens_of

COLUMNS = (*COMPONENTS, "loss")


@dataclass(frozen=True, slots=True)
class ValueJob:
    """How one method makes values/: what they depend on, and the workers that write them."""

    inputs: dict[str, Any]
    worker: type[ValueWorker]
    arguments: dict[str, Any]
    resources: Callable[[], Resources]


@dataclass(frozen=True, slots=True)
class ValueTask:
    """One shard: the part's file name, the fingerprint that its values carry, and the directory for them."""

    part: str
    fingerprint: str
    place: str = "values"


class ValueWorker(BatchedWorker):
    """Holds the policy and the directions, and values one shard after the other."""

    columns: tuple[str, ...] = COLUMNS

    def __init__(self, storage: Storage, source: ModelSource, settings: Settings, snapshots: Sequence[int]) -> None:
        """``snapshots``: the numbers of those that are valued with this model."""
        super().__init__(settings)
        self.storage = storage
        if settings.valuation.gradient_norm:
            self.columns = (*self.columns, GRADIENT_NORM)
        model = load_model(here(source), self.device)
        checked_layers(model, settings)
        valuation = settings.valuation
        try:
            self.valuers = [
                TokenValuer(
                    model,
                    _directions(storage, index),
                    valuation.layers,
                    valuation.window,
                    settings.model.attention,
                    valuation.estimator,
                    valuation.gradient_norm,
                )
                for index in snapshots
            ]
        except UnsupportedModel as error:
            raise RunFailed(f"model.policy: {error}") from error

    def __call__(self, task: ValueTask, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write one part of values; returns counts."""
        table = self.storage.read_table(f"prepared/{task.part}", PREPARED)
        ids = table.column("id").to_pylist()
        input_ids, labels = table.column("input_ids").to_pylist(), table.column("labels").to_pylist()
        columns, padded = self.score(ids, input_ids, labels, advance)
        arrays = [pa.array(ids, pa.string()), *[as_lists(columns[name]) for name in self.columns]]
        counts = {"tokens": sum(len(row) for row in input_ids), "padded_tokens": padded}
        table = pa.Table.from_arrays(arrays, schema=values_schema(self.settings.valuation.gradient_norm))
        self.storage.write_table(f"{task.place}/{task.part}", table, task.fingerprint, counts)
        return counts

    def _values(self, batch: Any, ids: list[str]) -> dict[str, np.ndarray]:
        """Mean over the snapshots, brought to the host in one copy."""
        names = [name for name in self.columns if name in (*COLUMNS, GRADIENT_NORM)]
        total = torch.zeros(())
        with lower_layers_once(self.valuers[0].scored) if len(self.valuers) > 1 else nullcontext():
            for valuer in self.valuers:
                found = valuer.value(batch)
                total = total.to(self.device) + torch.stack([found[name] for name in names]).float()
        host = (total / len(self.valuers)).cpu().numpy()
        return dict(zip(names, host, strict=True))


def _directions(storage: Storage, snapshot: int) -> Directions:
    place = f"anchors/snapshot-{snapshot:02d}"
    named = {name: read_tensors(storage, f"{place}/{name}.safetensors") for name in ("adaptation", "stability")}
    own = f"{place}/policy.safetensors"
    return Directions(named, read_tensors(storage, own) if storage.exists(own) else None)


def make_values(run: Run) -> None:
    """Write values/, unless done already; goes on with the parts that are missing. Raises SettingsWrong and RunFailed.

    Other methods than AlphaToken's need `prepare` alone. For preference data, reference/ is written as well.
    """
    started = time.monotonic()
    models, storage, manifest, progress = run.models, run.storage, run.manifest, run.progress
    run = run.for_data(manifest.pairs)
    settings = run.settings
    if settings.valuation.rehearsed:
        # Here and not above, since it builds on this file.
        from alphatoken.pipeline.value.rehearsal import run_rehearsal

        return run_rehearsal(run)
    if settings.valuation.needs_directions:
        job = _valuation_job(run)
    else:
        from alphatoken.pipeline.value.selection import selection_job

        job = selection_job(run)
    preference = manifest.pairs
    if preference:
        # Here and not above, since it builds on this file.
        from alphatoken.pipeline.value.pairs import pairs_job, reference_of

        job = pairs_job(run, job)
    configuration = {"model": settings.model, "valuation": settings.valuation, "cluster": settings.cluster}
    fingerprint = manifest.begin("value", job.inputs, configuration)
    rows = prepared_rows(run)
    missing = [part for part in rows if storage.rows_of(f"values/{part}", fingerprint) != rows[part]]
    if manifest.done("value") and not missing:
        progress.say("value: done already")
        return
    if len(missing) < len(rows):
        progress.say(f"value: {len(rows) - len(missing)} of {len(rows)} shards are complete already")
    resources = job.resources()
    if preference:
        place = reference_of(run)
        job.arguments["reference"] = place
        there = {part: storage.rows_of(f"reference/{part}", place.fingerprint) for part in rows}
        missing = [part for part in rows if part in missing or there[part] != rows[part]]
    tokens = {part: tokens_of(storage, part) if preference else _tokens(storage, part) for part in missing}
    counts: dict[str, Any] = {"tokens": 0, "padded_tokens": 0}

    finished = len(rows) - len(missing)

    def add(found: dict[str, Any]) -> None:
        for key in counts:
            counts[key] += found[key]

    def done(shard: Shard, result: dict[str, Any]) -> None:
        nonlocal finished
        add(result)
        finished += 1
        task.note(f"{finished}/{len(rows)} shards")

    for part in rows.keys() - set(missing):
        add(storage.counts_of(f"values/{part}", fingerprint) or dict.fromkeys(counts, 0))

    if len(models.checkpoints) > 1:
        # Here and not above, since it builds on this file.
        from alphatoken.pipeline.value.checkpoints import value_checkpoints

        for found in value_checkpoints(run, job, fingerprint, tokens, rows):
            add(found)
    else:
        with (
            run.cluster.pool(logged("value", job.worker), job.arguments, resources) as pool,
            progress.task("value", sum(tokens.values()), "tokens") as task,
        ):
            task.note(f"{finished}/{len(rows)} shards")
            pool.run([Shard(p, n) for p, n in tokens.items()], lambda s: ValueTask(s.name, fingerprint), done, task)
    seconds = time.monotonic() - started
    padding = 1 - counts["tokens"] / counts["padded_tokens"] if counts["padded_tokens"] else 0.0
    manifest.finish(
        "value", seconds, rows=sum(rows.values()), padding=round(padding, 4),
        workers=resources.workers, cpus_per_worker=resources.cpus, gpus_per_worker=resources.gpus, **counts,
    )  # fmt: skip
    progress.say(f"value: {counts['tokens']:,} tokens in {seconds:.0f} s, padding {padding:.1%}")


def prepared_rows(run: Run) -> dict[str, int]:
    """Part -> rows, in the order of the parts; raises RunFailed for one that is missing or damaged."""
    prepared, found = run.manifest.stage("prepare"), {}
    for part in prepared["counts"]["parts"]:
        count = run.storage.rows_of(f"prepared/{part}", prepared["fingerprint"])
        if count is None:
            raise RunFailed(f"prepared/{part} is missing or damaged: run `alphatoken prepare` again")
        found[part] = count
    return found


def checked_anchor(run: Run) -> dict[str, Any]:
    """The anchor's record; raises SettingsWrong where it was made for another policy or other layers."""
    checkpoints, layers = run.models.checkpoints, run.settings.valuation.layers
    anchor, named = run.manifest.require("anchor", "value"), ", ".join(checkpoints)
    if anchor["inputs"]["policy"] != of_policy(checkpoints):
        raise SettingsWrong(
            [f"model.policy={named} is not the policy that the anchors of {run.storage.root} were made with"]
        )
    if (made_for := anchor["inputs"]["valuation.layers"]) != layers:
        raise SettingsWrong([f"valuation.layers={layers}, but the anchors were made for {made_for}"])
    return anchor


def _valuation_job(run: Run) -> ValueJob:
    anchor, settings = checked_anchor(run), run.settings
    if anchor["inputs"]["anchor.drift"] == "rehearsal":
        raise SettingsWrong(
            [f"the anchors of {run.storage.root} were made for valuation.schedule=rehearsal: add run.overwrite=anchor"]
        )
    own = settings.model
    source = ModelSource(run.models.policy, own.revision, own.dtype, own.trust_remote_code)
    snapshots = range(anchor["counts"]["snapshots"])
    arguments = {"storage": run.storage, "source": source, "settings": settings, "snapshots": snapshots}
    inputs = value_inputs(settings, anchor["fingerprint"])
    return ValueJob(inputs, ValueWorker, arguments, run.cluster.model_resources)


def value_inputs(settings: Settings, upstream: str) -> dict[str, Any]:
    """Everything that values/ depends on."""
    valuation = settings.valuation
    schema = REHEARSED_VALUES if valuation.rehearsed else VALUES
    inputs = {
        "anchor": upstream,
        "valuation.window": valuation.window,
        "valuation.estimator": valuation.estimator,
        "valuation.method": valuation.method,
        **({"valuation.gradient_norm": True} if valuation.gradient_norm else {}),
        "schema": (schema.metadata or {})[b"alphatoken.schema"].decode(),
    }
    if valuation.rehearsed:
        inputs |= {"valuation.schedule": valuation.schedule, "run.seed": settings.run.seed}
        for name in ("rho", "stability_weight", "batch_size", "learning_rate", "refresh"):
            inputs[f"valuation.rehearsal.{name}"] = getattr(valuation.rehearsal, name)
    return inputs


def _tokens(storage: Storage, part: str) -> int:
    return sum(
        batch.column("input_ids").values.__len__() for batch in storage.read_batches(f"prepared/{part}", PREPARED)
    )

"""value, for preference pairs: both branches are scored as sequences of their own, then signed and scaled (Eq. 14).

The reference's log-probabilities come from a pass of its own, which is stored in reference/, so that no worker holds
two models. Where model.reference is model.policy there is no such pass: s is 0, and the policy's log-probabilities,
which the value workers have at hand, are stored as the reference's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from alphatoken.data_schemas import (
    BRANCHES,
    COMPONENTS,
    GRADIENT_NORM,
    PREFERENCE_PREPARED,
    PREFERENCE_REFERENCE,
    PREFERENCE_VALUES,
    preference_values_schema,
)
from alphatoken.pipeline.cluster.batched_worker import BatchedWorker, as_lists
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.models import ModelSource
from alphatoken.pipeline.maths.preference import margin, pair_weight
from alphatoken.pipeline.maths.selectors.forward import losses_and_entropies
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.fingerprint import digest, of_model, of_policy
from alphatoken.pipeline.run.run import Models, Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.value.reference import branches_as_sequences, halves, run_reference, write_reference
from alphatoken.pipeline.value.selection import SelectionWorker
from alphatoken.pipeline.value.stage import COLUMNS, ValueJob, ValueTask, ValueWorker

LOGPS = "policy_logps"


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference's log-probabilities: the fingerprint of their files, and whether the policy is the reference."""

    fingerprint: str
    is_policy: bool


class PairScoring(BatchedWorker):
    """What is done with the scores of the branches of a shard; the columns are those of values/ and LOGPS."""

    columns: tuple[str, ...] = (*COLUMNS, LOGPS)
    signed: Collection[str] = COMPONENTS  # these change their sign between the branches
    storage: Storage
    reference: Reference

    def __call__(self, task: ValueTask, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write one part of values, and where the policy is the reference one of reference/; returns counts."""
        table = self.storage.read_table(f"prepared/{task.part}", PREFERENCE_PREPARED)
        ids, input_ids, labels = branches_as_sequences(table)
        columns, padded = self.score(ids, input_ids, labels, advance)
        found = {b: {name: halves(rows)[i] for name, rows in columns.items()} for i, b in enumerate(BRANCHES)}
        own = {branch: found[branch][LOGPS] for branch in BRANCHES}
        if self.reference.is_policy:
            write_reference(self.storage, task.part, table.column("id"), own, self.reference.fingerprint)
            theirs: Mapping[str, Sequence[np.ndarray]] = own
        else:
            stored = self.storage.read_table(f"reference/{task.part}", PREFERENCE_REFERENCE)
            theirs = {branch: _rows(stored, f"{branch}_logps") for branch in BRANCHES}
        omega = omegas(own, theirs, self.settings.valuation.beta)
        arrays = {"id": table.column("id"), "omega": pa.array(omega, pa.float32())}
        for branch, sign in zip(BRANCHES, (1.0, -1.0), strict=True):
            arrays[f"{branch}_loss"] = as_lists(found[branch]["loss"])
            for name in COMPONENTS:
                factors = sign * omega if name in self.signed else np.ones_like(omega)
                scaled = [(row * w).astype(np.float32) for row, w in zip(found[branch][name], factors, strict=True)]
                arrays[f"{branch}_{name}"] = as_lists(scaled)
            if GRADIENT_NORM in columns:
                norms = zip(found[branch][GRADIENT_NORM], omega, strict=True)
                arrays[f"{branch}_{GRADIENT_NORM}"] = as_lists([(row * w).astype(np.float32) for row, w in norms])
        schema = preference_values_schema(GRADIENT_NORM in columns)
        values = pa.table([arrays[name] for name in schema.names], schema=schema)
        counts = {"tokens": sum(len(row) for row in input_ids), "padded_tokens": padded}
        self.storage.write_table(f"{task.place}/{task.part}", values, task.fingerprint, counts)
        return counts


class PreferenceValueWorker(PairScoring, ValueWorker):
    """As ValueWorker, for shards of pairs."""

    def __init__(
        self, storage: Storage, source: ModelSource, settings: Settings, snapshots: Sequence[int], reference: Reference
    ) -> None:
        ValueWorker.__init__(self, storage, source, settings, snapshots)
        if settings.valuation.estimator == "information":  # means the same in both branches
            self.signed = [name for name in COMPONENTS if name.startswith("stability")]
        self.reference = reference

    def _values(self, batch: Any, ids: list[str]) -> dict[str, np.ndarray]:
        """With the log-probabilities under model.policy itself, also where snapshots bring weights of their own.

        s belongs to the model that is going to be trained; a warm-up is no preference training.
        """
        valuer = self.valuers[0]
        swapped = any(v.weights is not None for v in self.valuers)
        with lower_layers_once(valuer.scored) if swapped else nullcontext():
            own = losses_and_entropies(valuer.scored.model, batch, valuer.attention)[0] if swapped else None
            found = ValueWorker._values(self, batch, ids)
        found[LOGPS] = 0.0 - (found["loss"] if own is None else own.cpu().numpy())
        return found


class PreferenceSelectionWorker(PairScoring, SelectionWorker):
    """As SelectionWorker, for shards of pairs: a score means the same in both branches, so it has no sign."""

    signed = ()

    def __init__(
        self,
        storage: Storage,
        sources: dict[str, ModelSource],
        settings: Settings,
        vocabulary: int | None,
        reference: Reference,
    ) -> None:
        SelectionWorker.__init__(self, storage, sources, settings, vocabulary)
        self.reference = reference

    def _values(self, batch: Any, ids: list[str]) -> dict[str, np.ndarray]:
        """The policy runs whatever the method is: omega and, where it is the reference, reference/ need it."""
        found = SelectionWorker._values(self, batch, ids)
        loss = found["loss"]
        if "policy" not in self.selector.models:
            loss = losses_and_entropies(self.models["policy"], batch, self.settings.model.attention)[0].cpu().numpy()
        found[LOGPS] = 0.0 - loss
        return found


def pair_inputs(inputs: dict[str, Any], settings: Settings, models: Models | None = None) -> dict[str, Any]:
    """What values/ of pairs depend on, from what those of supervised data depend on.

    ``models``: given where ``inputs`` do not cover both already, as those of the anchor do.
    """
    schema = (PREFERENCE_VALUES.metadata or {})[b"alphatoken.schema"].decode()
    found = {**inputs, "valuation.beta": settings.valuation.beta, "schema": schema}
    if models:
        found |= {"policy": of_model(models.policy), "reference": of_model(models.reference)}
        found |= {"model.revision": settings.model.revision, "model.dtype": settings.model.dtype}
    return found


def pairs_job(run: Run, job: ValueJob) -> ValueJob:
    """A job for supervised data as the one for pairs; the argument ``reference`` is added when it is known."""
    settings, models = run.settings, run.models
    if job.worker is ValueWorker:
        if run.manifest.stage("anchor")["inputs"]["reference"] != of_model(models.reference):
            raise SettingsWrong(
                [f"model.reference={models.reference} is not the reference that the anchors were made with"]
            )
        inputs = pair_inputs(job.inputs, settings)
        return ValueJob(inputs, PreferenceValueWorker, dict(job.arguments), job.resources)
    own, inputs = settings.model, pair_inputs(job.inputs, settings, models)
    source = ModelSource(models.policy, own.revision, own.dtype, own.trust_remote_code)
    arguments = {**job.arguments, "sources": {"policy": source, **job.arguments["sources"]}}
    return ValueJob(inputs, PreferenceSelectionWorker, arguments, run.cluster.model_resources)


def omegas(
    policy: Mapping[str, Sequence[np.ndarray]], reference: Mapping[str, Sequence[np.ndarray]], beta: float
) -> np.ndarray:
    """omega of every pair, ``(pairs,)`` float64, from the log-probabilities of its branches' response tokens."""
    own, theirs = ({b: _sums(model[b]) for b in BRANCHES} for model in (policy, reference))
    s = margin(own["chosen"], own["rejected"], theirs["chosen"], theirs["rejected"], beta)
    return pair_weight(s, beta).numpy()


def _sums(rows: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.tensor([float(row.sum(dtype=np.float64)) for row in rows], dtype=torch.float64)


def _rows(table: pa.Table, name: str) -> list[np.ndarray]:
    column = table.column(name).combine_chunks()
    flat, ends = column.flatten().to_numpy(), column.offsets.to_numpy()
    return np.split(flat, ends[1:-1] - ends[0]) if len(column) else []


def reference_of(run: Run) -> Reference:
    """Where the reference's log-probabilities are; runs the reference's pass where it is another model.

    Of several checkpoints one may be the reference; its pass is run all the same.
    """
    prepared, found = run.manifest.stage("prepare"), of_model(run.models.reference)
    model = run.settings.model
    inputs = {
        "prepare": prepared["fingerprint"], "reference": found, "model.revision": model.revision,
        "model.dtype": model.dtype, "schema": (PREFERENCE_REFERENCE.metadata or {})[b"alphatoken.schema"].decode(),
    }  # fmt: skip
    place = Reference(digest(inputs), found == of_policy(run.models.checkpoints))
    if not place.is_policy:
        started = time.monotonic()
        counts = run_reference(run, place.fingerprint)
        run.manifest.note("value", reference={"seconds": round(time.monotonic() - started, 3), **counts})
    run.manifest.note("value", reference_fingerprint=place.fingerprint)
    return place

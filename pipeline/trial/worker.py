"""The worker of a trial: holds the policy, and does one fine-tune after the other over hidden states that its node shares."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from alphatoken.pipeline.anchor.coverage import checked_layers
from alphatoken.pipeline.anchor.engine import Engine
from alphatoken.pipeline.anchor.loading import held_model
from alphatoken.pipeline.maths.decoder import UnsupportedModel, no_scored_layers
from alphatoken.pipeline.maths.divergence import ReferencePredictions, same_vocabulary
from alphatoken.pipeline.maths.epochs import row_order
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.placement import device_of
from alphatoken.pipeline.maths.trial import Entering, Fit, fine_tune
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.trial.candidates import Candidate, Labels, kept_tokens
from alphatoken.pipeline.trial.entering import TrialRows, TrialStates, learner_of
from alphatoken.pipeline.trial.kinds import PairTrial, SupervisedTrial, TrialKind
from alphatoken.pipeline.trial.measures import Measures

TOKENS_PER_PASS = 4096


@dataclass(frozen=True, slots=True)
class TrialTask:
    """One fine-tune: a candidate, its ``labels`` of every sequence of the sample, the seed of the rows' order; ``output``: its
    file."""

    candidate: Candidate
    labels: Labels
    seed: int
    steps: int
    output: str
    fingerprint: str


class TrialWorker:
    """``reference``: the reference where it is another model than the policy, of which the head alone is held; else None.

    ``name``: of all that hidden states depend on.
    """

    def __init__(
        self, storage: Storage, source: ModelSource, reference: ModelSource | None, settings: Settings, rows: TrialRows,
        name: str,
    ) -> None:  # fmt: skip
        self.storage, self.settings, self.rows = storage, settings, rows
        kernel = settings.model.attention
        theirs, kind = None, _kind(settings, rows)
        if reference is not None:  # before the policy is loaded, so that never two are held whole
            scored = no_scored_layers(held_model(reference, settings, "model.reference"))
            kind.see_reference(scored.model, kernel, TOKENS_PER_PASS)
            theirs = ReferencePredictions(scored, Entering(rows.completions), kernel, TOKENS_PER_PASS).without_layers()
        scored = checked_layers(held_model(source, settings), settings)
        if theirs is not None and not same_vocabulary([theirs.reference.model, scored.model]):
            raise RunFailed(
                "model.policy and model.reference have vocabularies of different sizes: they cannot be compared"
            )
        Engine(scored, settings)(rows.held_out.input_ids)
        try:
            self.learner = learner_of(scored, settings)
        except UnsupportedModel as error:
            raise RunFailed(f"model.policy: {error}") from error
        self.states = TrialStates(scored, self.learner, settings, rows, f"{name}-{device_of(scored.model).type}")
        self.states.fill([])
        completions = self.states.entering("completions")
        predictions = theirs or ReferencePredictions(scored, completions, kernel, TOKENS_PER_PASS)
        self.kind = kind
        self.measures = Measures(self.learner, kind, self.states, predictions)
        self.device_lock = threading.Lock()  # two shards are in flight, one at a time uses the model

    def __call__(self, task: TrialTask, advance: Callable[[int], None]) -> None:
        """Fine-tune, measure, and write the result as JSON."""
        with self.device_lock:
            found = self._result(task, advance)
        self.storage.write_json(task.output, {"fingerprint": task.fingerprint, **found})

    def _result(self, task: TrialTask, advance: Callable[[int], None]) -> dict[str, Any]:
        untouched = task.candidate.kind == "untouched"
        found: dict[str, Any] = {
            "candidate": task.candidate.name,
            "kind": task.candidate.kind,
            "seed": task.seed,
            "kept_tokens": 0 if untouched else kept_tokens(task.labels),
            "trained_tokens": 0,
            "failed": None,
        }
        own, examples = self.settings.trial, self.kind.examples(self.rows.train)
        order = [] if untouched else row_order(examples, own.batch_size, task.steps, task.seed)
        fit = Fit(order, own.rate, self.settings.model.attention, TOKENS_PER_PASS)
        names = self.rows.train.ids
        try:
            self.states.fill(self.kind.sequences(sorted({row for rows in order for row in rows}), self.rows.train))
            if not self.kind.knows_reference:
                self.kind.see_policy(self.learner, self.states, fit)
            labels = [row.tolist() for row in task.labels]
            objective = self.kind.objective(self.states.entering("train", labels), labels)
            weights, found["trained_tokens"] = fine_tune(self.learner, objective, fit, advance)
        except NonFinite as error:
            found["failed"] = f"NaN or infinity in {error.where}, example {names[error.row]}"
            return found
        except torch.OutOfMemoryError as error:
            raise RunFailed(
                f"trial: a pass of {TOKENS_PER_PASS} tokens does not fit into the device's memory: set a smaller data.max_length"
            ) from error
        return {**found, **self.measures(weights, fit)}


def _kind(settings: Settings, rows: TrialRows) -> TrialKind:
    return PairTrial(settings.valuation.beta, rows) if rows.pairs else SupervisedTrial()

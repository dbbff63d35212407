"""The worker of a trial: holds the policy and what enters its last layers, and does one fine-tune after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alphatoken.pipeline.anchor.coverage import checked_layers
from alphatoken.pipeline.anchor.engine import Engine
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.decoder import no_scored_layers
from alphatoken.pipeline.maths.divergence import ReferencePredictions, same_vocabulary
from alphatoken.pipeline.maths.epochs import row_order
from alphatoken.pipeline.maths.head import HeadMemory
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.trial import Entering, Fit, entering_hidden, fine_tune, held_out_losses
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.trial.candidates import Candidate, Labels, kept_tokens
from alphatoken.pipeline.trial.hidden import HiddenFile

TOKENS_PER_PASS = 4096


@dataclass(frozen=True, slots=True)
class TrialRows:
    """``train``: the sample, with the labels of everything; ``held_out`` and ``completions``: what is measured on."""

    train: Sequences
    held_out: Sequences
    completions: Sequences


@dataclass(frozen=True, slots=True)
class TrialTask:
    """One fine-tune: a candidate, its ``labels`` of every row of the sample, the seed of the rows' order; ``output``: its file."""

    candidate: Candidate
    labels: Labels
    seed: int
    steps: int
    output: str
    fingerprint: str


class TrialWorker:
    """``reference``: the reference where it is another model than the policy, of which the head alone is held; else None."""

    def __init__(
        self, storage: Storage, source: ModelSource, reference: ModelSource | None, settings: Settings, rows: TrialRows
    ) -> None:
        self.storage, self.settings, self.rows = storage, settings, rows
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kernel = settings.model.attention
        theirs = None
        if reference is not None:  # before the policy is loaded, so that never two are held whole
            scored = no_scored_layers(load_model(here(reference), self.device))
            theirs = ReferencePredictions(scored, rows.completions, kernel, TOKENS_PER_PASS).without_layers()
        self.scored = checked_layers(load_model(here(source), self.device), settings)
        if theirs is not None and not same_vocabulary([theirs.reference.model, self.scored.model]):
            raise RunFailed(
                "model.policy and model.reference have vocabularies of different sizes: they cannot be compared"
            )
        if not self.scored.shared:
            raise RunFailed(
                "trial: a layer of model.policy hands on more than the hidden state (keys and values, a router's state), so "
                "that its lower layers cannot be computed once: fine-tune it whole to compare masks"
            )
        Engine(self.scored, settings)(rows.held_out.input_ids)
        self.reference = theirs or ReferencePredictions(self.scored, rows.completions, kernel, TOKENS_PER_PASS)
        self.hidden = HiddenFile(settings.trial.cache_bytes)
        self.held_out = self._entering("held-out", rows.held_out)
        self.completions = self._entering("completions", rows.completions)
        self.memory = HeadMemory()
        self.device_lock = threading.Lock()  # two shards are in flight, one at a time uses the model

    def __call__(self, task: TrialTask, advance: Callable[[int], None]) -> None:
        """Fine-tune, measure, and write the result as JSON."""
        with self.device_lock:
            found = self._result(task, advance)
        self.storage.write_json(task.output, {"fingerprint": task.fingerprint, **found})

    def _result(self, task: TrialTask, advance: Callable[[int], None]) -> dict[str, Any]:
        whole = kept_tokens(task.labels)
        untouched = task.candidate.kind == "untouched"
        found: dict[str, Any] = {
            "candidate": task.candidate.name,
            "kind": task.candidate.kind,
            "seed": task.seed,
            "kept_tokens": 0 if untouched else whole,
            "trained_tokens": 0,
            "failed": None,
        }
        own = self.settings.trial
        train = Sequences(self.rows.train.ids, self.rows.train.input_ids, [row.tolist() for row in task.labels])
        order = [] if untouched else row_order(len(train), own.batch_size, task.steps, task.seed)
        fit = Fit(order, own.learning_rate, self.settings.model.attention, TOKENS_PER_PASS, self.memory)
        names: Sequence[str] = train.ids
        try:
            weights, found["trained_tokens"] = fine_tune(self.scored, self._entering("train", train), fit, advance)
            names = self.rows.held_out.ids
            losses, tokens = held_out_losses(self.scored, weights, self.held_out, fit)
        except NonFinite as error:
            found["failed"] = f"NaN or infinity in {error.where}, example {names[error.row]}"
            return found
        except torch.OutOfMemoryError as error:
            raise RunFailed(
                f"trial: a pass of {TOKENS_PER_PASS} tokens does not fit into the device's memory: set a smaller data.max_length"
            ) from error
        moved, positions = self.reference.divergences(self.scored, weights, self.completions)
        divergence = float(moved.sum() / positions.sum())
        if not divergence < float("inf"):
            found["failed"] = "NaN or infinity in the predictions on the reference's completions"
            return found
        found["row_losses"], found["row_tokens"] = losses.tolist(), [int(n) for n in tokens]
        found["adaptation"] = float(losses.sum() / tokens.sum())
        found["retention"] = divergence
        return found

    def _entering(self, what: str, rows: Sequences) -> Entering:
        kernel = self.settings.model.attention

        def hidden(row: int) -> torch.Tensor:
            made = self.hidden.get(f"{what}/{row}", lambda: entering_hidden(self.scored, rows.input_ids[row], kernel))
            if not bool(torch.isfinite(made).all()):
                raise RunFailed(
                    f"NaN or infinity below the last layers, example {rows.ids[row]}: check the model or its dtype"
                )
            return made

        return Entering(rows, hidden)

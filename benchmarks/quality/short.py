"""Fine-tune in steps that a trial would make, over hidden states from below that are made once, and measure the losses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from alphatoken.jobs.config import load
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.decoder import ScoredLayers, scored_layers
from alphatoken.pipeline.maths.epochs import row_order
from alphatoken.pipeline.maths.models import ModelSource, load_model
from alphatoken.pipeline.maths.trial import (
    Entering,
    Fit,
    LabelledTokens,
    entering_hidden,
    fine_tune,
    held_out_losses,
)
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.trial.entering import learner_of

KERNEL, TOKENS_PER_PASS = "sdpa", 4096


@dataclass(frozen=True, slots=True)
class Setting:
    """How a trial is made. ``examples``: the first so many of the rows; ``epochs`` over them; ``train``: as trial.train."""

    layers: int = 3
    learning_rate: float = 3e-4
    batch_size: int = 2
    examples: int = 40
    epochs: float = 1.0
    train: str = "layers"

    @property
    def steps(self) -> int:
        """AdamW steps."""
        return round(self.epochs * self.examples / self.batch_size)


class ShortFineTunes:
    """A model, and the hidden states of every row that has been seen."""

    def __init__(self, model: Path, held_out: Mapping[str, Sequences], dtype: str = "bfloat16") -> None:
        """``held_out``: what is measured on, by name."""
        self.model, self.dtype, self.held_out = model, dtype, held_out
        self.scored: dict[int, ScoredLayers] = {}
        self.hidden: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}

    def measure(self, train: Sequences | None, setting: Setting, seed: int) -> dict[str, Any]:
        """One short fine-tune and its losses, nats per token, by the names of the held-out rows; None: the model untouched.

        ``cpu``: seconds of the fine-tune alone; ``seconds``: with measuring; hidden states are in neither.
        """
        if setting.layers not in self.scored:
            model = load_model(ModelSource(str(self.model), dtype=self.dtype), torch.device("cpu"))
            self.scored[setting.layers] = scored_layers(model, setting.layers)
        learner = learner_of(self.scored[setting.layers], _settings(setting.train))
        own = Sequences([], [], []) if train is None else train.take(range(min(setting.examples, len(train))))
        order = [] if train is None else row_order(len(own), setting.batch_size, setting.steps, seed)
        fit = Fit(order, setting.learning_rate, KERNEL, TOKENS_PER_PASS)
        held_out = {name: self._entering(learner.scored, rows) for name, rows in self.held_out.items()}
        objective = LabelledTokens(self._entering(learner.scored, own))
        began, cpu = time.monotonic(), time.process_time()
        weights, trained = fine_tune(learner, objective, fit, lambda _: None)
        learned, losses = time.process_time() - cpu, {}
        for name, rows in held_out.items():
            sums, counts = held_out_losses(learner, weights, rows, fit)
            losses[name] = float(sums.sum() / counts.sum())
        return {
            "seed": seed, "trained": trained, **losses, "cpu": learned, "seconds": time.monotonic() - began,
        }  # fmt: skip

    def _entering(self, scored: ScoredLayers, rows: Sequences) -> Entering:
        """With the hidden states from below, made here where they are missing and can be shared."""
        if not scored.shared:
            return Entering(rows)
        layers = len(scored.layers)
        for ids in rows.input_ids:
            key = (layers, tuple(ids))
            if key not in self.hidden:
                self.hidden[key] = entering_hidden(scored, ids, KERNEL)
        return Entering(rows, lambda row: self.hidden[layers, tuple(rows.input_ids[row])])


@cache
def _settings(train: str) -> Settings:
    return load([f"trial.train={train}"])

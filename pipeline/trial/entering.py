"""The sequences of a trial, what learns on them, and what of each enters the first layer that learns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from alphatoken.pipeline.maths.adapters import Adapters, all_layers
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.learners import EveryWeight, Learner, ScoredWeights
from alphatoken.pipeline.maths.trial import Entering, entering_hidden
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.trial.hidden import HiddenStates


@dataclass(frozen=True, slots=True)
class TrialRows:
    """``train``: the sample, with the labels of everything; ``held_out``, ``completions`` and ``retention`` (None: there are no
    such rows): what is measured on. ``pairs``: whether the former two are branches of pairs, see rows.py."""

    train: Sequences
    held_out: Sequences
    completions: Sequences
    retention: Sequences | None
    pairs: bool

    def sets(self) -> dict[str, Sequences]:
        """By name; what every fine-tune reads comes first."""
        found = {
            "held-out": self.held_out,
            "completions": self.completions,
            "retention": self.retention,
            "train": self.train,
        }
        return {name: rows for name, rows in found.items() if rows is not None}


def learner_of(scored: ScoredLayers, settings: Settings) -> Learner:
    """That of trial.train. Raises UnsupportedModel."""
    own = settings.trial
    if own.train == "lora":
        return Adapters(all_layers(scored.model), own.rank, settings.run.seed)
    return EveryWeight(scored) if own.train == "all" else ScoredWeights(scored)


class TrialStates:
    """What enters the first layer that learns, of every sequence of a trial; kept nowhere where passes run whole.

    ``name``: of all that it depends on.
    """

    def __init__(self, scored: ScoredLayers, learner: Learner, settings: Settings, rows: TrialRows, name: str) -> None:
        self.scored, self.kernel, self.sets = scored, settings.model.attention, rows.sets()
        self.file: HiddenStates | None = None
        self.first: dict[str, int] = {}
        self.sequences: list[tuple[str, list[int]]] = []
        for what, some in self.sets.items():
            self.first[what] = len(self.sequences)
            self.sequences += zip(some.ids, some.input_ids, strict=True)
        if learner.scored.shared and scored.lower:
            shortest = min((ids for _, ids in self.sequences), key=len)
            width = entering_hidden(scored, shortest, self.kernel).shape[1]
            lengths = [len(ids) for _, ids in self.sequences]
            self.file = HiddenStates(name, lengths, width, settings.trial.cache_bytes)

    def entering(self, what: str, labels: list[list[int]] | None = None) -> Entering:
        """A set of sequences, with ``labels`` in the place of its own."""
        rows = self.sets[what]
        if labels is not None:
            rows = Sequences(rows.ids, rows.input_ids, labels)
        return Entering(rows, None if self.file is None else lambda row: self._state(self.first[what] + row))

    def fill(self, train: Iterable[int]) -> None:
        """Have all that is measured on and these rows of ``train`` there; the work is shared with the node's other workers."""
        if self.file is not None:
            numbers = [*range(self.first["train"]), *(self.first["train"] + row for row in train)]
            self.file.fill(numbers, self._made)

    def _state(self, number: int) -> torch.Tensor:
        assert self.file is not None
        return self.file.get(number, self._made)

    def _made(self, number: int) -> torch.Tensor:
        name, ids = self.sequences[number]
        made = entering_hidden(self.scored, ids, self.kernel)
        if not bool(torch.isfinite(made).all()):
            raise RunFailed(f"NaN or infinity below the last layers, example {name}: check the model or its dtype")
        return made

"""A short fine-tune on hard labels, and what became of the model: losses on held-out rows. Torch alone.

Where lower layers do not learn, the hidden state that enters the first scored layer is the same in every step of every
fine-tune: it is made once per sequence and handed in. What is left to do costs a tenth of a whole fine-tune.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from alphatoken.pipeline.maths.adamw import ScoredAdamW
from alphatoken.pipeline.maths.attention import intercepted
from alphatoken.pipeline.maths.batch import Batch, Sequences, by_token_budget, collate
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.ghost import read_pass
from alphatoken.pipeline.maths.learners import READ, Learner, Weights
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.placement import device_of
from alphatoken.pipeline.maths.warmup import schedule

LEAST_FULL = 7 / 8  # of a pass's longest sequence: a shorter one goes into the next pass


@dataclass(frozen=True, slots=True)
class Entering:
    """Sequences and what of them enters the first scored layer.

    ``hidden(i)``: (length, d) of sequence i, on any device and in any dtype; the same whenever it is asked for. None: passes
    run whole.
    """

    sequences: Sequences
    hidden: Callable[[int], torch.Tensor] | None = None

    def batch(self, rows: Sequence[int], scored: ScoredLayers) -> tuple[Batch, AbstractContextManager[None]]:
        """Some sequences on the model's device, and a block of code in which passes over them go on from what is kept.

        No real position sees padding, which stands on its right.
        """
        device = device_of(scored.model)
        batch = self.sequences.take(rows).batch()
        if self.hidden is None:
            return batch.to(device), nullcontext()
        states = [self.hidden(row) for row in rows]
        padded = states[0].new_zeros(*batch.shape, states[0].shape[-1])
        for place, state in enumerate(states):
            padded[place, : len(state)] = state
        kept = padded.to(device, scored.maps[0].parameter.dtype)
        return batch.to(device), lower_layers_once(scored, [kept])

    def groups(self, rows: Sequence[int], budget: int) -> list[list[int]]:
        """``rows`` in passes of at most ``budget`` padded tokens, of which few are padding; depends on lengths alone."""
        lengths = [len(self.sequences.input_ids[row]) for row in rows]
        found: list[list[int]] = []
        for group in by_token_budget(lengths, budget):  # longest first
            found.append([])
            for i in group:
                if found[-1] and lengths[i] < LEAST_FULL * lengths[found[-1][0]]:
                    found.append([])
                found[-1].append(i)
        return [[rows[i] for i in group] for group in found]


@dataclass(frozen=True, slots=True)
class Fit:
    """How a fine-tune is run: ``order``, the rows of every step; peak ``learning_rate``; ``kernel`` of attention;
    ``budget``, padded tokens of one pass."""

    order: Sequence[Sequence[int]]
    learning_rate: float
    kernel: str
    budget: int


class Objective(Protocol):
    """Rows to learn from, and the loss that is lowered on them."""

    def groups(self, rows: Sequence[int], budget: int) -> list[list[int]]:
        """The rows of one step in passes of at most ``budget`` padded tokens."""

    def backward(self, learner: Learner, rows: Sequence[int], fit: Fit, where: str) -> tuple[int, int]:
        """Add the gradient of the SUM over the rows of one pass; the learner holds the weights.

        Returns what the step's sum is divided by, and the tokens that were learned from. Raises NonFinite, whose ``row`` is
        the number of the sequence, with ``where``.
        """


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """The Objective of supervised data: the mean cross-entropy of a step's labelled tokens."""

    rows: Entering

    def groups(self, rows: Sequence[int], budget: int) -> list[list[int]]:
        """See Objective."""
        return self.rows.groups(rows, budget)

    def backward(self, learner: Learner, rows: Sequence[int], fit: Fit, where: str) -> tuple[int, int]:
        """See Objective."""
        batch, from_below = self.rows.batch(rows, learner.scored)
        with from_below:
            losses = learner.backward(batch, fit.kernel)
        check(losses, batch, rows, where)
        return len(losses), len(losses)


@torch.no_grad()
def entering_hidden(scored: ScoredLayers, input_ids: Sequence[int], kernel: str) -> torch.Tensor:
    """The hidden state (length, d) of one sequence that enters the first scored layer, on the model's device.

    By itself, so that it does not depend on what else is in a batch. Of a model whose lower layers hand on more than one
    such state: a placeholder (length, 1), over which every pass runs whole.
    """
    batch = collate([input_ids], [input_ids]).to(device_of(scored.model))
    kept: list[torch.Tensor] = []
    with intercepted(scored.decoder, kernel, None), lower_layers_once(scored, kept):
        scored.decoder(input_ids=batch.input_ids, use_cache=False)
    if not kept or kept[0].ndim != 3:
        return torch.zeros(len(input_ids), 1)
    return kept[0][0]


def fine_tune(
    learner: Learner, objective: Objective, fit: Fit, advance: Callable[[int], None]
) -> tuple[dict[str, torch.Tensor], int]:
    """What has been learned after AdamW steps from the learner's start, at least float32, by name; and tokens trained on.

    Rise, cosine and clipping are those of the warm-up. The model itself stays as it is. ``advance`` is called with 1 after
    a step. Raises NonFinite, whose ``row`` is the number of the sequence.
    """
    adamw, trained = ScoredAdamW(learner.start(), fit.learning_rate), 0
    for step, rows in enumerate(fit.order):
        learner.clear()
        parts = 0
        with learner.holding(adamw.masters()):
            for group in objective.groups(rows, fit.budget):
                share, tokens = objective.backward(learner, group, fit, f"the loss at step {step + 1}")
                parts, trained = parts + share, trained + tokens
        adamw.step(learner.gradient, parts, schedule(step, len(fit.order)))
        advance(1)
    return adamw.masters(), trained


def held_out_losses(learner: Learner, weights: Weights, rows: Entering, fit: Fit) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the labelled tokens' cross-entropies (nats) and their number, per sequence: two (sequences,), float64.

    Raises NonFinite, whose ``row`` is the number of the sequence.
    """
    sums, counts = (torch.zeros(len(rows.sequences), dtype=torch.float64) for _ in range(2))
    for group in rows.groups(range(len(rows.sequences)), fit.budget):
        batch, from_below = rows.batch(group, learner.scored)
        with learner.holding(weights), from_below:
            losses = read_pass(learner.scored, batch, READ, None, {}, fit.kernel)[0]
        check(losses, batch, group, "the loss of held-out rows")
        add_by_row(sums, counts, losses, batch, group)
    return sums, counts


def add_by_row(
    sums: torch.Tensor, counts: torch.Tensor, found: torch.Tensor, batch: Batch, rows: Sequence[int]
) -> None:
    """Add ``found`` (n,), in the order of ``batch.predicting()``, to the sums and counts of the sequences ``rows``."""
    places = torch.tensor(rows)[batch.predicting().cpu() // batch.shape[1]]
    sums.index_add_(0, places, found.detach().cpu().double())
    counts.index_add_(0, places, torch.ones(len(places), dtype=torch.float64))


def check(losses: torch.Tensor, batch: Batch, rows: Sequence[int], where: str) -> None:
    """Raise NonFinite with the first of the sequences ``rows`` that has a loss which is not finite.

    The lower layers were finite before, or their example would have been named: what is not, a step has made.
    """
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        first = int(batch.predicting()[int((~finite).nonzero()[0])]) // batch.shape[1]
        raise NonFinite(rows[first], where)

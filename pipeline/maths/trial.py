"""A short fine-tune of the scored layers on hard labels, and what became of the model: losses and divergence. Torch alone.

Lower layers do not learn, so the hidden state that enters the first scored layer is the same in every step of every
fine-tune: it is made once per sequence and handed in. What is left to do costs a tenth of a whole fine-tune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from alphatoken.pipeline.maths.adamw import ScoredAdamW
from alphatoken.pipeline.maths.attention import intercepted
from alphatoken.pipeline.maths.batch import Batch, Sequences, by_token_budget, collate
from alphatoken.pipeline.maths.capture import swapped
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.ghost import read_pass
from alphatoken.pipeline.maths.head import HeadMemory, Predictions
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.warmup import schedule

READ = [Predictions.losses]
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Entering:
    """Sequences and what of them enters the first scored layer.

    ``hidden(i)``: (length, d) of sequence i, on any device and in any dtype; the same whenever it is asked for.
    """

    sequences: Sequences
    hidden: Callable[[int], torch.Tensor]

    def batch(self, rows: Sequence[int], like: torch.Tensor) -> tuple[Batch, torch.Tensor]:
        """Some sequences, and their hidden states (batch, length, d), 0 at padding; on the device, in the dtype of ``like``.

        No real position sees padding, which stands on its right.
        """
        batch = self.sequences.take(rows).batch()
        states = [self.hidden(row) for row in rows]
        padded = states[0].new_zeros(*batch.shape, states[0].shape[-1])
        for place, state in enumerate(states):
            padded[place, : len(state)] = state
        return batch.to(like.device), padded.to(like.device, like.dtype)

    def groups(self, rows: Sequence[int], budget: int) -> list[list[int]]:
        """``rows`` in passes of at most ``budget`` padded tokens; depends on lengths alone."""
        lengths = [len(self.sequences.input_ids[row]) for row in rows]
        return [[rows[i] for i in group] for group in by_token_budget(lengths, budget)]


@dataclass(frozen=True, slots=True)
class Fit:
    """How a fine-tune is run: ``order``, the sequences of every step; peak ``learning_rate``; ``kernel`` of attention;
    ``budget``, padded tokens of one pass; ``memory`` of logits, kept from one pass to the next."""

    order: Sequence[Sequence[int]]
    learning_rate: float
    kernel: str
    budget: int
    memory: HeadMemory = field(default_factory=HeadMemory)


@torch.no_grad()
def entering_hidden(scored: ScoredLayers, input_ids: Sequence[int], kernel: str) -> torch.Tensor:
    """The hidden state (length, d) of one sequence that enters the first scored layer, on the model's device.

    By itself, so that it does not depend on what else is in a batch. Of a model whose lower layers hand on more than one
    such state: a placeholder (length, 1), over which every pass runs whole.
    """
    batch = collate([input_ids], [input_ids]).to(next(scored.model.parameters()).device)
    kept: list[torch.Tensor] = []
    with intercepted(scored.decoder, kernel, None), lower_layers_once(scored, kept):
        scored.decoder(input_ids=batch.input_ids, use_cache=False)
    if not kept or kept[0].ndim != 3:
        return torch.zeros(len(input_ids), 1)
    return kept[0][0]


def fine_tune(
    scored: ScoredLayers, train: Entering, fit: Fit, advance: Callable[[int], None]
) -> tuple[dict[str, torch.Tensor], int]:
    """The scored weights after AdamW steps from the model's own, at least float32, by name; and tokens trained on.

    A step's loss is the mean over its labelled tokens; rise, cosine and clipping are those of the warm-up. The model itself
    stays as it is. ``advance`` is called with 1 after a step. Raises NonFinite, whose ``row`` is the number of the sequence.
    """
    like = scored.maps[0].parameter
    adamw, trained = ScoredAdamW(scored.weights(), fit.learning_rate), 0
    for step, rows in enumerate(fit.order):
        total, tokens = OuterSum(scored), 0
        for group in train.groups(rows, fit.budget):
            batch, hidden = train.batch(group, like)
            with swapped(scored, adamw.masters()), lower_layers_once(scored, [hidden]):
                losses = read_pass(scored, batch, READ, total, {}, fit.kernel, memory=fit.memory)[0]
            _check(losses, batch, group, f"the loss at step {step + 1}")
            tokens += len(losses)
        adamw.step(total.total, tokens, schedule(step, len(fit.order)))
        trained += tokens
        advance(1)
    return adamw.masters(), trained


def held_out_losses(
    scored: ScoredLayers, weights: Weights, rows: Entering, fit: Fit
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the labelled tokens' cross-entropies (nats) and their number, per sequence: two (sequences,), float64.

    Raises NonFinite, whose ``row`` is the number of the sequence.
    """
    sums, counts = (torch.zeros(len(rows.sequences), dtype=torch.float64) for _ in range(2))
    for group in rows.groups(range(len(rows.sequences)), fit.budget):
        batch, hidden = rows.batch(group, scored.maps[0].parameter)
        with swapped(scored, dict(weights)), lower_layers_once(scored, [hidden]):
            losses = read_pass(scored, batch, READ, None, {}, fit.kernel, memory=fit.memory)[0]
        _check(losses, batch, group, "the loss of held-out rows")
        add_by_row(sums, counts, losses, batch, group)
    return sums, counts


def add_by_row(
    sums: torch.Tensor, counts: torch.Tensor, found: torch.Tensor, batch: Batch, rows: Sequence[int]
) -> None:
    """Add ``found`` (n,), in the order of ``batch.predicting()``, to the sums and counts of the sequences ``rows``."""
    places = torch.tensor(rows)[batch.predicting().cpu() // batch.shape[1]]
    sums.index_add_(0, places, found.detach().cpu().double())
    counts.index_add_(0, places, torch.ones(len(places), dtype=torch.float64))


def _check(losses: torch.Tensor, batch: Batch, rows: Sequence[int], where: str) -> None:
    """The lower layers were finite before, or their example would have been named: what is not, a step has made."""
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        first = int(batch.predicting()[int((~finite).nonzero()[0])]) // batch.shape[1]
        raise NonFinite(rows[first], where)

"""The paper's own closed loop: values recomputed at every step of the fine-tune, threshold within the batch."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from alphatoken import Directions, TokenValuer
from alphatoken.pipeline.maths.batch import IGNORED, Batch, collate
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.masking import threshold_of
from alphatoken.pipeline.maths.outer_sums import OuterSum
from benchmarks.quality.finetune import Tokens

VALIDATION_ROWS = 8  # drawn anew at every step


def closed_loop(
    model: torch.nn.Module, validation: Tokens, seed: int, rho: float = 0.5, layers: int = 3, window: int = 32
) -> Callable[[int, Batch], Batch]:
    """A relabelling that keeps the ``rho`` highest-valued tokens of each batch at the model as it is then (Eq. 13)."""
    generator = random.Random(seed)

    def relabel(step: int, batch: Batch) -> Batch:
        rows = [validation[i] for i in generator.sample(range(len(validation)), VALIDATION_ROWS)]
        held = collate([ids for ids, _ in rows], [labels for _, labels in rows])
        scored = scored_layers(model, layers)
        gradient = OuterSum(scored)
        gradient.positions = held.predicting()
        ghost_pass(scored, held, gradient)
        still = {name: torch.zeros_like(matrix) for name, matrix in gradient.total.items()}  # no stability
        directions = Directions({"adaptation": gradient.total, "stability": still})
        found = TokenValuer(model, directions, layers, window, scores=["paper"]).value(batch)
        value = found["adaptation_direct"] + found["adaptation_causal"]
        response = batch.labels != IGNORED
        threshold = float(threshold_of(value[response].numpy(), rho))
        return Batch(batch.input_ids, batch.labels.masked_fill(response & (value < threshold), IGNORED), batch.lengths)

    return relabel

"""Rehearsal: the paper's closed loop on the scored modules alone, in pieces that can be spread over workers.

One step takes a batch of examples: their values at the present weights (Eqs. 8, 9, 11, 12), the threshold among them
(Eq. 13), and an AdamW step on the mean loss of the tokens that are kept. Lower layers are frozen, so the hidden state
that enters the first scored layer is the same whenever an example has its turn: it is computed once and handed on.

Sums are taken over *lanes*, a fixed partition of the batch: within a lane in order, then over the lanes in order, so
that the numbers do not depend on who computes which lane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from alphatoken.pipeline.maths.batch import IGNORED, Batch, by_token_budget
from alphatoken.pipeline.maths.capture import swapped
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.masking import Bools, Floats, threshold_of, token_values
from alphatoken.pipeline.maths.nonfinite import locate
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.valuer import TokenValuer

LANES = 8  # and so at most as many workers have something to do at once

Weights = Mapping[str, torch.Tensor]


def lanes_of(lengths: Sequence[int], budget: int) -> list[list[list[int]]]:
    """Lanes of groups of sequences: each group one pass of at most ``budget`` padded tokens; depends on lengths alone."""
    groups = by_token_budget(lengths, budget)
    lanes = min(LANES, len(groups))
    return [groups[i * len(groups) // lanes : (i + 1) * len(groups) // lanes] for i in range(lanes)]


def kept_in_batch(components: Mapping[str, Floats], rho: float, stability_weight: float) -> Bools:
    """Which of a batch's response tokens are kept (Eq. 13), ``(tokens,)``; ``components`` over these tokens."""
    values = token_values(components, "paper", stability_weight, {"score": 1.0, "stability": 1.0})
    return values >= threshold_of(values, rho) if len(values) else np.zeros(0, np.bool_)


class RehearsedModel:
    """The passes of one step, at scored weights that are given with each call; the model itself stays as it is.

    ``hidden`` in the methods: an empty list to be filled with the hidden state that enters the first scored layer, or
    the list that an earlier call with the same batch has filled.
    """

    def __init__(self, scored: ScoredLayers, window: int, attention: str, scores: Sequence[str], exact: bool) -> None:
        self.scored, self.window, self.attention = scored, window, attention
        self.scores, self.exact = scores, exact

    def valuer(self, directions: Mapping[str, Weights]) -> TokenValuer:
        """For ``values``; worth keeping while the directions stay the same."""
        layers = len(self.scored.layers)
        return TokenValuer(
            self.scored.model, Directions(directions), layers, self.window, self.attention, self.scores, self.exact
        )

    def values(
        self, valuer: TokenValuer, weights: dict[str, torch.Tensor], batch: Batch, hidden: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The columns of ``TokenValuer`` for one batch, (batch, length)."""
        with swapped(self.scored, weights), lower_layers_once(self.scored, hidden):
            return valuer.value(batch)

    def add_gradient(
        self,
        total: OuterSum,
        weights: dict[str, torch.Tensor],
        batch: Batch,
        hidden: list[torch.Tensor],
        direction: bool,
    ) -> torch.Tensor:
        """Add the gradient of the batch's summed loss; returns the losses (n,) of its labelled tokens.

        ``direction``: positions that predict a labelled token alone enter the sum, as the adaptation direction wants
        it; else the whole gradient of the scored weights.
        """
        total.positions = batch.predicting() if direction else None
        with swapped(self.scored, weights), lower_layers_once(self.scored, hidden):
            losses = ghost_pass(self.scored, batch, total, self.attention)
            if not bool(torch.isfinite(losses).all()):
                raise locate(self.scored, batch, self.attention)
        return losses


def without_masked(labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Labels of one example, -100 where a token is not kept."""
    return np.where(kept, labels, np.int32(IGNORED))

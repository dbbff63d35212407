"""valuation.method=loss: keep the tokens that the policy finds likely; a filter against wrong tokens.

    score = -loss(policy)                                                       higher: keep

The small-loss criterion: what a model finds very unlikely is more often wrong than the rest (Co-teaching, Han et al.
2018, arXiv 1804.06872, for noisy labels). Mind what it leaves out where the data is clean: what is still to be learned
also has a high loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.selectors.forward import losses_and_entropies


class LowLoss:
    """Minus the token's cross-entropy under the policy, in nats."""

    models: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(self, models: dict[str, Any], attention: str, seed: int) -> None:
        self.policy, self.attention = models["policy"], attention

    def __call__(self, batch: Batch, ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """See Selector."""
        loss, _ = losses_and_entropies(self.policy, batch, self.attention)
        return {"score": -loss, "loss": loss}

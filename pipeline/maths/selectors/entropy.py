"""valuation.method=entropy: keep the tokens before which the policy is undecided.

    score = -sum over the vocabulary of p log p,   p = policy's distribution before the token      higher: keep

The few tokens of high entropy are where a text decides how it goes on; reinforcement learning on these alone does as
well as on all ("Beyond the 80/20 Rule", Wang et al. 2025, arXiv 2506.01939). Does not look at the token itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.selectors.forward import losses_and_entropies


class HighEntropy:
    """Entropy of the policy's predictive distribution, in nats."""

    models: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(self, models: dict[str, Any], attention: str, seed: int) -> None:
        self.policy, self.attention = models["policy"], attention

    def __call__(self, batch: Batch, ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """See Selector."""
        loss, entropy = losses_and_entropies(self.policy, batch, self.attention, entropy=True)
        return {"score": entropy, "loss": loss}

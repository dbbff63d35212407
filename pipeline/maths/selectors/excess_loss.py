"""valuation.method=excess_loss: keep the tokens that the reference already knows better than the policy.

    score = loss(policy) - loss(reference)                                      higher: keep

Rho-1 (Lin et al. 2024, arXiv 2404.07965, "excess loss"): the current model's loss minus that of a reference model
trained on good data. A token is worth learning when a good model finds it likely and the present one does not; wrong
tokens are unlikely under both. Mind the roles: `model.policy` is the model that is about to be trained, and
`model.reference` has to be one that was trained on good data of the target, NOT the pre-trained model to stay close
to, as for AlphaToken's stability. Given the pre-trained model as reference, the sign would mean the opposite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.selectors.forward import losses_and_entropies


class ExcessLoss:
    """The token's cross-entropy under the policy minus that under the reference, in nats."""

    models: ClassVar[tuple[str, ...]] = ("policy", "reference")

    def __init__(self, models: dict[str, Any], attention: str, seed: int) -> None:
        self.policy, self.reference, self.attention = models["policy"], models["reference"], attention

    def __call__(self, batch: Batch, ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """See Selector; ``loss`` is the policy's."""
        loss, _ = losses_and_entropies(self.policy, batch, self.attention)
        reference, _ = losses_and_entropies(self.reference, batch, self.attention)
        return {"score": loss - reference, "loss": loss}

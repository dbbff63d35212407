"""One ghost pass: forward, losses at the response, backward through the scored layers; a visitor sees every (h, d).

All quantities of the method are visitors of this pass: token values contract (h, d) with a direction, the validation
gradient sums d h^T, the Fisher sums d^2 (h^2)^T.
"""

from __future__ import annotations

import torch
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.capture import Visitor, captured
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.head import token_losses


def ghost_pass(
    scored: ScoredLayers, batch: Batch, visitor: Visitor, kernel: str = "sdpa", window: int = 0
) -> torch.Tensor:
    """Run one batch; ``visitor`` is called once per scored linear map (and expert), from the last to the first.

    Errors are those of L = the SUM of the response tokens' cross-entropies. Returns the loss of every predicting
    position (n,), in the order of ``batch.predicting()``, in nats.
    """
    positions = batch.predicting()
    if not len(positions):
        return torch.zeros(0, device=batch.input_ids.device)
    with captured(scored, visitor, kernel, window):
        outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
        hidden = outputs.last_hidden_state.flatten(0, 1)[positions]
        targets = batch.labels.flatten()[positions + 1]
        losses, gradient = token_losses(scored, outputs, hidden, targets)
        hidden.backward(gradient)
    return losses

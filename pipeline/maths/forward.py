"""A forward pass without gradients: the loss of every response token, as the reference's pass and omega need it."""

from __future__ import annotations

from typing import Any

import torch

from alphatoken.pipeline.maths.attention import intercepted
from alphatoken.pipeline.maths.batch import Batch, Sequences, by_token_budget
from alphatoken.pipeline.maths.decoder import no_scored_layers
from alphatoken.pipeline.maths.head import Predictions, read_head
from alphatoken.pipeline.maths.nonfinite import NonFinite, locate_forward
from alphatoken.pipeline.maths.placement import device_of


@torch.no_grad()
def token_losses_of(model: Any, batch: Batch, attention: str) -> torch.Tensor:
    """Cross-entropy of every response token in nats: (batch, length) float32, at the token's own index, else 0.0.

    ``model``: on the batch's device and in evaluation mode; no layer is scored. `tokens x vocabulary` is never held
    whole. Raises NonFinite.
    """
    positions = batch.predicting()
    flat = torch.zeros(batch.shape[0] * batch.shape[1], device=batch.input_ids.device)
    if len(positions):
        targets, headed = batch.labels.flatten()[positions + 1], no_scored_layers(model)
        with intercepted(headed.decoder, attention, None):
            outputs = headed.decoder(input_ids=batch.input_ids, use_cache=False)
            hidden = outputs.last_hidden_state.flatten(0, 1)[positions]
            found, _ = read_head(headed, outputs, hidden, targets, [Predictions.losses], backward=False)
        flat[positions + 1] = found[0].float()
        if not bool(torch.isfinite(flat).all()):
            raise locate_forward(model, batch) or NonFinite(0, "the loss")
    return flat.unflatten(0, batch.shape)


def response_logps(model: Any, rows: Sequences, attention: str, budget: int) -> torch.Tensor:
    """The log-probability of every sequence's whole response, (sequences,) float64, nats; ``budget``: tokens of a pass."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    device = device_of(model)
    for group in by_token_budget([len(ids) for ids in rows.input_ids], budget):
        losses = token_losses_of(model, rows.take(group).batch().to(device), attention)
        found[group] = -losses.double().sum(dim=1).cpu()
    return found

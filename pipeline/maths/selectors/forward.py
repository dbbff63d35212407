"""A forward pass without gradients: loss and entropy at the positions that predict a response token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from alphatoken.pipeline.maths.attention import intercepted
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.decoder import decoder_of
from alphatoken.pipeline.maths.head import chunk_rows, head_of
from alphatoken.pipeline.maths.nonfinite import NonFinite, locate_forward
from torch import nn


@dataclass(frozen=True, slots=True)
class _Headed:
    model: nn.Module

    @property
    def decoder(self) -> nn.Module:
        return decoder_of(self.model)


@torch.no_grad()
def losses_and_entropies(
    model: Any, batch: Batch, attention: str, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every response token and entropy of the distribution that predicts it, in nats.

    Both (batch, length) float32, at the token's own index, 0.0 outside the response. The entropy is 0.0 everywhere
    unless asked for. ``model``: on the batch's device and in evaluation mode. `tokens x vocabulary` is never held
    whole. Raises NonFinite.
    """
    positions = batch.predicting()
    flat = torch.zeros((2, batch.shape[0] * batch.shape[1]), device=batch.input_ids.device)
    if len(positions):
        targets = batch.labels.flatten()[positions + 1]
        headed, rows = _Headed(model), []
        with intercepted(model, attention, None):
            outputs = headed.decoder(input_ids=batch.input_ids, use_cache=False)
            hidden = outputs.last_hidden_state.flatten(0, 1)[positions]
            size = chunk_rows(model, hidden)
            with head_of(headed, outputs) as head:
                for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
                    rows.append(_of_logits(head(part).float(), wanted, entropy))
        flat[:, positions + 1] = torch.cat(rows, dim=1)
        if not bool(torch.isfinite(flat).all()):
            raise locate_forward(model, batch) or NonFinite(0, "the loss or the entropy")
    losses, entropies = flat.unflatten(1, batch.shape)
    return losses, entropies


def _of_logits(logits: torch.Tensor, targets: torch.Tensor, entropy: bool) -> torch.Tensor:
    """Logits (n, vocabulary) -> (2, n): cross-entropy; entropy, or zeros."""
    log_probability = logits.log_softmax(dim=-1)
    losses = -log_probability.gather(1, targets[:, None]).squeeze(1)
    if not entropy:
        return torch.stack([losses, torch.zeros_like(losses)])
    # A logit of minus infinity is a token that cannot follow: it adds nothing.
    terms = torch.where(torch.isneginf(log_probability), 0.0, log_probability.exp() * log_probability)
    return torch.stack([losses, -terms.sum(dim=-1)])

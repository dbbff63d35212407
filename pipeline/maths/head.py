"""Losses and their errors at the positions that predict a response token, in chunks of the vocabulary's width.

`tokens x vocabulary` is never held whole. The model's own treatment of the logits (soft caps, scales) is kept: each
chunk of hidden states is sent through the model's forward with the decoder short-circuited, so that only what comes
after the decoder runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.maths.decoder import ScoredLayers

CHUNK_BYTES = 128 << 20


class HeadedModel(Protocol):
    """A causal language model and its decoder; ScoredLayers is one."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def decoder(self) -> nn.Module: ...


@contextmanager
def head_of(scored: HeadedModel, outputs: Any) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Yields hidden (n, d) -> logits (n, vocabulary), as the model computes them after its decoder.

    ``outputs``: what the decoder returned; its last hidden state is replaced by the chunk.
    """
    decoder = scored.decoder
    result = copy.copy(outputs)

    def short_circuit(*args: object, **kwargs: object) -> Any:
        return result

    def head(hidden: torch.Tensor) -> torch.Tensor:
        result.last_hidden_state = hidden[None]
        placeholder = torch.zeros((1, hidden.shape[0]), dtype=torch.int64, device=hidden.device)
        return scored.model(input_ids=placeholder, use_cache=False).logits.squeeze(0)

    own = decoder.__dict__.get("forward")  # accelerate's hooks stand there
    decoder.forward = short_circuit
    try:
        yield head
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


def chunk_rows(model: Any, hidden: torch.Tensor) -> int:
    """Rows of hidden states per chunk, so that one chunk of logits takes at most CHUNK_BYTES."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return max(16, CHUNK_BYTES // (vocabulary * max(4, hidden.element_size())))


def token_losses(
    scored: ScoredLayers, outputs: Any, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy per token and the gradient of its sum with respect to the hidden states.

    ``hidden`` (n, d): last hidden states at the predicting positions; ``targets`` (n,). Returns losses (n,) in nats,
    in at least float32, and the gradient (n, d) in the dtype of ``hidden``.
    """
    losses, gradients = [], []
    rows = chunk_rows(scored.model, hidden)
    with head_of(scored, outputs) as head:
        for part, wanted in zip(hidden.detach().split(rows), targets.split(rows), strict=True):
            part.requires_grad_(True)
            logits = head(part)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(logits, wanted, reduction="none")
            gradients.append(torch.autograd.grad(loss.sum(), part)[0])
            losses.append(loss.detach())
    return torch.cat(losses), torch.cat(gradients)

"""Losses and their errors at the positions that predict a response token, in chunks of the vocabulary's width.

`tokens x vocabulary` is never held whole. The model's own treatment of the logits (soft caps, scales) is kept: each
chunk of hidden states is sent through the model's forward with the decoder short-circuited, so that only what comes
after the decoder runs. Where that turns out to be one matrix, its backward is one product with it, and every chunk
uses the same memory; otherwise autograd goes back through whatever it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

CHUNK_BYTES = 128 << 20
CACHE_BYTES = 1 << 20  # of logits that are worked on at a time: half of a usual second-level cache


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
    scored: HeadedModel, outputs: Any, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy per token and the gradient of its sum with respect to the hidden states.

    ``hidden`` (n, d): last hidden states at the predicting positions; ``targets`` (n,). Returns losses (n,) in nats,
    in at least float32, and the gradient (n, d) in the dtype of ``hidden``.
    """
    losses, gradients = [], []
    weight: torch.Tensor | None = None  # the head's, once the first chunk has shown that it is this matrix alone
    buffer = hidden.new_empty(0)
    rows = chunk_rows(scored.model, hidden)
    with head_of(scored, outputs) as head, watched(scored.model) as plain_weight:
        for index, (part, wanted) in enumerate(zip(hidden.detach().split(rows), targets.split(rows), strict=True)):
            if weight is None:
                logits = head(part.requires_grad_(True))
                weight = plain_weight(part, logits) if index == 0 else None
                buffer = logits.detach()
            else:  # into the same memory: fresh pages cost as much as arithmetic
                buffer = torch.mm(part, weight.mT, out=buffer[: len(part)])
            work = buffer.to(torch.promote_types(buffer.dtype, torch.float32), copy=weight is None)
            losses.append(_to_errors(work, wanted))
            errors = work.to(buffer.dtype)
            gradients.append(torch.autograd.grad(logits, part, errors)[0] if weight is None else errors @ weight)
    return torch.cat(losses), torch.cat(gradients)


def _to_errors(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses (n,) of logits (n, vocabulary), which become their own errors, softmax - one-hot.

    A few rows at a time, so that what one step leaves in the cache the next one finds there.
    """
    losses = logits.new_empty(len(targets))
    step = max(1, CACHE_BYTES // (logits.shape[1] * logits.element_size()))
    for part, wanted, loss in zip(logits.split(step), targets.split(step), losses.split(step), strict=True):
        part.sub_(part.amax(dim=1, keepdim=True))
        at = part.gather(1, wanted[:, None])
        total = part.exp_().sum(dim=1, keepdim=True)
        part.div_(total).scatter_add_(1, wanted[:, None], -torch.ones_like(total))
        loss.copy_((total.log() - at).squeeze(1))
    return losses


@contextmanager
def watched(model: Any) -> Iterator[Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]]:
    """Yields (hidden, logits) -> the weight (vocabulary, d) where logits are hidden @ weight.T and nothing else, or None.

    They are where the output embedding is a linear map without bias that was handed the hidden states as they are, and
    whose output was handed out as it is: the same memory, never written to since (no scale, cap or cast around it). One
    with hooks or a forward of its own (offloaded weights) is no such map.
    """
    module = model.get_output_embeddings()
    plain = (
        type(module) is nn.Linear
        and module.bias is None
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
    seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def remember(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen[:] = [(args[0], output, output._version)]

    def plain_weight(hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
        if not seen or not plain:
            return None
        entering, leaving, version = seen.pop()
        same = _same_memory(entering, hidden) and _same_memory(leaving, logits) and leaving._version == version
        return module.weight.detach() if same and module.weight.dtype == hidden.dtype else None

    hook = module.register_forward_hook(remember)
    try:
        yield plain_weight
    finally:
        hook.remove()


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype

"""Attention that yields its band: the probabilities A[k, p] with which a position p reaches the next W positions k.

Registered with transformers' attention interface, so that it sees query, key and value of every architecture that
uses it. The output comes from the fused kernel; the band is computed block by block from query and key, in memory
linear in the sequence length (identity 4 of the method). Where the fused kernel refuses what a model needs
(soft-capped logits, attention sinks) the same blocks give the output as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "alphatoken"
BLOCK = 128

_active = threading.local()  # the listener of the forward pass that runs in this thread


@dataclass(frozen=True, slots=True)
class BandBlock:
    """Attention probabilities, averaged over heads, of queries [start, stop) on keys [first, stop).

    ``probability`` (batch, stop - start, stop - first) is zero outside 0 < k - p <= W.
    """

    start: int
    stop: int
    first: int
    probability: torch.Tensor


Listener = Callable[[nn.Module, torch.Tensor, Callable[[int], list[BandBlock]]], None]


@contextmanager
def intercepted(model: Any, kernel: str, listener: Listener | None) -> Iterator[None]:
    """Route the model's attention through this file for one block of code.

    ``kernel`` (sdpa | flash_attention_2 | eager) computes the outputs. ``listener(module, value, band)`` is called at
    every attention module: ``value`` (batch, heads, length, head size) as the kernel sees it, ``band(W)`` computes the
    blocks of the band. Attention implementation and listener are as before when the block is left.
    """
    before = model.config._attn_implementation
    saved = getattr(_active, "state", None)
    _active.state = (kernel, listener)
    try:
        model.set_attn_implementation(f"{NAME}_{'flash' if kernel.startswith('flash') else 'dense'}")
        yield
    finally:
        model.set_attn_implementation(before)
        _active.state = saved


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The registered function; query (batch, heads, length, size), key and value with their own number of heads."""
    kernel, listener = _active.state
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = _Scores(query, key, attention_mask, scale, softcap, s_aux, sliding_window)
    if listener is not None:
        listener(module, value, lambda window: _band(scores, window))
    differentiated = any(forward_ad.unpack_dual(t).tangent is not None for t in (query, key, value))
    if kernel == "eager" or softcap is not None or s_aux is not None or differentiated:
        return _blockwise(scores, value), None
    function = ALL_ATTENTION_FUNCTIONS[kernel]
    output, _ = function(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        sliding_window=sliding_window,
        **kwargs,
    )
    return output, None


@dataclass(frozen=True, slots=True)
class _Scores:
    """Everything that decides attention probabilities, evaluated for a block of queries at a time."""

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    window: int | None

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """(start, stop, first): queries [start, stop) attend to keys [first, stop) at most."""
        length = self.query.shape[2]
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            yield start, stop, 0 if self.window is None else max(0, start - self.window + 1)

    def log_probability(
        self, query: torch.Tensor, key: torch.Tensor, start: int, stop: int, first: int
    ) -> torch.Tensor:
        """Log attention probabilities (batch, heads, stop - start, stop - first) in at least float32."""
        groups = query.shape[1] // key.shape[1]
        batch, heads, rows, size = query.shape
        grouped = query.reshape(batch, key.shape[1], groups * rows, size)
        logits = (grouped @ key.transpose(2, 3)).reshape(batch, heads, rows, key.shape[2])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits + self._bias(logits, start, stop, first)
        if self.sinks is None:
            return logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        sink = self.sinks.to(logits.dtype).reshape(1, -1, 1, 1).expand(batch, -1, rows, 1)
        return logits - torch.logsumexp(torch.cat([logits, sink], dim=-1), dim=-1, keepdim=True)

    def _bias(self, logits: torch.Tensor, start: int, stop: int, first: int) -> torch.Tensor:
        floor = torch.finfo(logits.dtype).min
        if self.mask is not None and self.mask.ndim == 4:
            part = self.mask[:, :, start:stop, first:stop]
            if part.dtype == torch.bool:
                return torch.zeros_like(part, dtype=logits.dtype).masked_fill(~part, floor)
            return part.to(logits.dtype)
        queries = torch.arange(start, stop, device=logits.device)[:, None]
        keys = torch.arange(first, stop, device=logits.device)[None, :]
        hidden = keys > queries
        if self.window is not None:
            hidden |= keys <= queries - self.window
        return torch.zeros_like(hidden, dtype=logits.dtype).masked_fill(hidden, floor)


@torch.no_grad()
def _band(scores: _Scores, window: int) -> list[BandBlock]:
    """The blocks of the band of width ``window``, averaged over heads."""
    found = []
    query, key = scores.query.detach(), scores.key.detach()
    for start, stop, low in scores.blocks():
        log_probability = scores.log_probability(query[:, :, start:stop], key[:, :, low:stop], start, stop, low)
        first = max(low, start - window)
        probability = log_probability[..., first - low :].exp().mean(dim=1)
        distance = (
            torch.arange(start, stop, device=query.device)[:, None]
            - torch.arange(first, stop, device=query.device)[None]
        )
        probability.masked_fill_((distance <= 0) | (distance > window), 0.0)
        found.append(BandBlock(start, stop, first, probability))
    return found


def _blockwise(scores: _Scores, value: torch.Tensor) -> torch.Tensor:
    """Attention output (batch, length, heads, size) by blocks of queries; probabilities are recomputed in backward."""

    def block(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, stop: int, first: int
    ) -> torch.Tensor:
        probability = scores.log_probability(query, key, start, stop, first).exp().to(value.dtype)
        batch, heads, rows, width = probability.shape
        grouped = probability.reshape(batch, value.shape[1], -1, width) @ value
        return grouped.reshape(batch, heads, rows, -1)

    outputs = []
    needs_graph = torch.is_grad_enabled() and any(t.requires_grad for t in (scores.query, scores.key, value))
    for start, stop, first in scores.blocks():
        arguments = (
            scores.query[:, :, start:stop], scores.key[:, :, first:stop], value[:, :, first:stop], start, stop, first,
        )  # fmt: skip
        outputs.append(checkpoint(block, *arguments, use_reentrant=False) if needs_graph else block(*arguments))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def apply_band(band: list[BandBlock], error: torch.Tensor) -> torch.Tensor:
    """e_p = sum over 0 < k - p <= W of A[k, p] d_k (Eq. 9).

    ``error`` d: (batch, length, d_v) at the value projection's output. Returns e of the same shape and dtype.
    """
    reached = torch.zeros_like(error)
    for block in band:
        rows = block.probability.to(error.dtype).transpose(1, 2) @ error[:, block.start : block.stop]
        reached[:, block.first : block.stop] += rows
    return reached


for _kind, _mask in (("dense", "sdpa"), ("flash", "flash_attention_2")):
    AttentionInterface.register(f"{NAME}_{_kind}", _attention)
    AttentionMaskInterface.register(f"{NAME}_{_kind}", ALL_MASK_ATTENTION_FUNCTIONS[_mask])

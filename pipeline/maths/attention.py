"""Attention that yields its band: the probabilities A[k, p] with which a position p reaches the next W positions k.

Registered with transformers' attention interface, so that it sees query, key and value of every architecture that
uses it. The output comes from the fused kernel; the band is computed block by block from query and key, in memory
linear in the sequence length (identity 4 of the method). Where the fused kernel refuses what a model needs
(soft-capped logits, attention sinks) the same blocks give the output as well, and where query, key and value are dual
numbers (tangents.py) they give its derivative, whatever the kernel.
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

from alphatoken.pipeline.maths.tangents import tangent_of, without_tangent

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
    (query, key, value), moved = _taken_apart(query, key, value)
    scores = _Scores(query, key, attention_mask, scale, softcap, s_aux, sliding_window)
    blocks = _Blocks(scores, value, moved)
    if listener is not None:
        listener(module, value, blocks.band)
    if kernel == "eager" or softcap is not None or s_aux is not None:
        output = _blockwise(scores, value)
    else:
        output, _ = ALL_ATTENTION_FUNCTIONS[kernel](
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
    return (output if moved is None else forward_ad.make_dual(output, blocks.derivative())), None


def _taken_apart(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Values, with their graph, and derivatives of dual numbers; None where no tensor has one."""
    values = [without_tangent(tensor) for tensor in tensors]
    tangents = [tangent_of(tensor) for tensor in tensors]
    if all(tangent is None for tangent in tangents):
        return values, None
    return values, [torch.zeros_like(v) if t is None else t for v, t in zip(values, tangents, strict=True)]


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

    def probability(self, query: torch.Tensor, key: torch.Tensor, start: int, stop: int, first: int) -> torch.Tensor:
        """Attention probabilities (batch, heads, stop - start, stop - first) in at least float32."""
        batch, _, rows, _ = query.shape
        logits = self.products(query, key)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = self._masked(logits, start, stop, first)
        if self.sinks is None:
            return logits.softmax(dim=-1)
        sink = self.sinks.to(logits.dtype).reshape(1, -1, 1, 1).expand(batch, -1, rows, 1)
        return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]

    def products(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Scaled q . k (batch, heads, rows, keys) in at least float32; several query heads may share a key head."""
        batch, heads, rows, _ = query.shape
        products = _grouped(query, key.shape[1]) @ key.transpose(2, 3)
        products = products.reshape(batch, heads, rows, key.shape[2])
        return products.to(torch.promote_types(products.dtype, torch.float32)).mul_(self.scale)

    def _masked(self, logits: torch.Tensor, start: int, stop: int, first: int) -> torch.Tensor:
        """``logits`` with what may not be seen at the lowest finite number, or with the mask's own numbers added."""
        floor = torch.finfo(logits.dtype).min
        if self.mask is not None and self.mask.ndim == 4:
            part = self.mask[:, :, start:stop, first:stop]
            return logits.masked_fill_(~part, floor) if part.dtype == torch.bool else logits.add_(part)
        queries = torch.arange(start, stop, device=logits.device)[:, None]
        keys = torch.arange(first, stop, device=logits.device)[None, :]
        hidden = keys > queries
        if self.window is not None:
            hidden |= keys <= queries - self.window
        return logits.masked_fill_(hidden, floor)


class _Blocks:
    """Block by block, each block's probabilities made once: the band, and the output's derivative where ``moved`` is
    that of query, key and value."""

    def __init__(self, scores: _Scores, value: torch.Tensor, moved: list[torch.Tensor] | None) -> None:
        self.scores, self.value, self.moved = scores, value, moved
        self._derivative: torch.Tensor | None = None

    def derivative(self) -> torch.Tensor:
        """(batch, length, heads, size), as the kernel's output."""
        if self._derivative is None:
            self.band(0)
        assert self._derivative is not None
        return self._derivative

    @torch.no_grad()
    def band(self, window: int) -> list[BandBlock]:
        """The blocks of the band of width ``window``, averaged over heads."""
        scores, found, derivatives = self.scores, [], []
        query, key, value = scores.query.detach(), scores.key.detach(), self.value.detach()
        for start, stop, low in scores.blocks():
            part = query[:, :, start:stop], key[:, :, low:stop]
            probability = scores.probability(*part, start, stop, low)
            if window:
                found.append(_band_block(probability, start, stop, low, window))
            if self.moved is not None:
                derivatives.append(self._moved(probability, *part, value[:, :, low:stop], start, stop, low))
        if self.moved is not None:
            self._derivative = torch.cat(derivatives, dim=2).transpose(1, 2)
        return found

    def _moved(
        self,
        probability: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        start: int,
        stop: int,
        low: int,
    ) -> torch.Tensor:
        """With s = q . k and o = sum of p v: o' = sum of p (s' - sum of p s') v + p v', (batch, heads, rows, size)."""
        assert self.moved is not None
        of_query, of_key, of_value = self.moved
        scores = self.scores
        slope = scores.products(of_query[:, :, start:stop], key)
        slope += scores.products(query, of_key[:, :, low:stop])
        if scores.softcap is not None:
            slope *= 1 - torch.tanh(scores.products(query, key) / scores.softcap).square()
        # A sink has no derivative of its own, and its share of the probability is missing in the sum: as it should be.
        slope.mul_(probability)
        slope.addcmul_(probability, slope.sum(dim=-1, keepdim=True), value=-1)
        groups, shape = key.shape[1], (*query.shape[:3], -1)
        moved = _grouped(slope.to(value.dtype), groups) @ value
        moved += _grouped(probability.to(value.dtype), groups) @ of_value[:, :, low:stop]
        return moved.reshape(shape)


def _grouped(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(batch, heads, rows, n) -> (batch, groups, heads / groups * rows, n): query heads beside the key head they share."""
    return rows.reshape(rows.shape[0], groups, -1, rows.shape[3])


def _band_block(probability: torch.Tensor, start: int, stop: int, low: int, window: int) -> BandBlock:
    first = max(low, start - window)
    mean = probability[..., first - low :].mean(dim=1)
    device = probability.device
    distance = torch.arange(start, stop, device=device)[:, None] - torch.arange(first, stop, device=device)[None]
    return BandBlock(start, stop, first, mean.masked_fill_((distance <= 0) | (distance > window), 0.0))


def _blockwise(scores: _Scores, value: torch.Tensor) -> torch.Tensor:
    """Attention output (batch, length, heads, size) by blocks of queries; probabilities are recomputed in backward."""

    def block(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, stop: int, first: int
    ) -> torch.Tensor:
        probability = scores.probability(query, key, start, stop, first).to(value.dtype)
        return (_grouped(probability, value.shape[1]) @ value).reshape(*query.shape[:3], -1)

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

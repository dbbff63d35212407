"""Softmax attention by blocks of queries: outputs, their derivative, and the band A[k, p] of the next W positions.

Memory is linear in the sequence length (identity 4 of the method): probabilities are made for BLOCK queries at a time
and never kept whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

BLOCK = 64  # queries: twice as many leave the cache with rows of 2,048 tokens, and cost a third more


@dataclass(frozen=True, slots=True)
class BandBlock:
    """Attention probabilities, averaged over heads, of queries [start, stop) on keys [first, stop).

    ``probability`` (batch, stop - start, stop - first) is zero outside 0 < k - p <= W.
    """

    start: int
    stop: int
    first: int
    probability: torch.Tensor


@dataclass(frozen=True, slots=True)
class Moved:
    """Derivatives of what attention is given, each of its tensor's shape; None: it has none."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    sinks: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Attended:
    """Everything that decides what an attention module computes.

    ``query`` (batch, heads, length, size), ``key`` and ``value`` with their own number of heads and, where a model appends
    compressed keys, more of them than queries. ``mask``: what may be seen, or numbers that are added to the scores, or
    None: all that is ``causal``. ``bias``: added to the scores. ``sinks`` (heads,) or (batch, heads, length, 1): a key
    without a value. ``window``: how far back a query can see at most, as far as the model says so.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    scale: float
    softcap: float | None
    window: int | None
    causal: bool

    def spans(self) -> Iterator[tuple[int, int, int, int]]:
        """(start, stop, low, high): queries [start, stop) see keys of [low, high) at most."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        forward = (self.mask is not None or self.causal) and keys == queries  # a mask is that of a decoder
        for start in range(0, queries, BLOCK):
            stop = min(start + BLOCK, queries)
            high = stop if forward and not self._sees(start, stop, stop, keys) else keys
            low = 0 if self.window is None else max(0, start - self.window + 1)
            yield start, stop, 0 if low and self._sees(start, stop, 0, low) else low, high

    def _sees(self, start: int, stop: int, low: int, high: int) -> bool:
        """Whether the mask lets a query of [start, stop) see a key of [low, high)."""
        if self.mask is None or low >= high:
            return False
        part = _part(self.mask, start, stop, low, high)
        if part.is_floating_point():
            part = part > torch.finfo(part.dtype).min / 2
        return bool(part.any())

    def probability(self, query: torch.Tensor, key: torch.Tensor, span: tuple[int, int, int, int]) -> torch.Tensor:
        """Of queries and keys of a span: (batch, heads, stop - start, high - low) in at least float32."""
        start, stop, _, _ = span
        logits = self.products(query, key)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.bias is not None:
            logits = logits.add_(_part(self.bias, *span))
        logits = self._masked(logits, span)
        if self.sinks is None:
            return logits.softmax(dim=-1)
        batch, heads, rows, _ = logits.shape
        sinks = self.sinks.reshape(1, -1, 1, 1) if self.sinks.ndim == 1 else self.sinks[:, :, start:stop]
        sinks = sinks.to(logits.dtype).expand(batch, heads, rows, 1)
        return torch.cat([logits, sinks], dim=-1).softmax(dim=-1)[..., :-1]

    def products(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Scaled q . k (batch, heads, rows, keys) in at least float32; several query heads may share a key head."""
        batch, heads, rows, _ = query.shape
        products = _grouped(query, key.shape[1]) @ key.transpose(2, 3)
        products = products.reshape(batch, heads, rows, key.shape[2])
        return products.to(torch.promote_types(products.dtype, torch.float32)).mul_(self.scale)

    def _masked(self, logits: torch.Tensor, span: tuple[int, int, int, int]) -> torch.Tensor:
        """``logits`` with what may not be seen at the lowest finite number, or with the mask's own numbers added."""
        start, stop, low, high = span
        floor = torch.finfo(logits.dtype).min
        if self.mask is not None:
            part = _part(self.mask, *span)
            return logits.masked_fill_(~part, floor) if part.dtype == torch.bool else logits.add_(part)
        if not self.causal:
            return logits
        first = low if self.window is not None else max(low, start)  # keys before are seen by every query of the span
        queries = torch.arange(start, stop, device=logits.device)[:, None]
        keys = torch.arange(first, high, device=logits.device)[None, :]
        hidden = keys > queries
        if self.window is not None:
            hidden |= keys <= queries - self.window
        logits[..., first - low :].masked_fill_(hidden, floor)
        return logits

    def output(self, held: bool = False) -> torch.Tensor:
        """(batch, length, heads, size); probabilities are recomputed in the backward pass, or ``held`` for it."""

        def block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *span: int) -> torch.Tensor:
            probability = self.probability(query, key, span).to(value.dtype)  # type: ignore[arg-type]  # four of them
            return (_grouped(probability, value.shape[1]) @ value).reshape(*query.shape[:3], -1)

        given = (self.query, self.key, self.value, self.bias, self.sinks)
        again = not held and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        outputs = []
        for span in self.spans():
            start, stop, low, high = span
            arguments = (self.query[:, :, start:stop], self.key[:, :, low:high], self.value[:, :, low:high], *span)
            outputs.append(checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments))
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


class AttentionBlocks:
    """Block by block, each block's probabilities made once: the band, and the output's derivative where ``moved`` is
    that of what attention is given."""

    def __init__(self, attended: Attended, moved: Moved | None) -> None:
        self.attended, self.moved = attended, moved
        self._derivative: torch.Tensor | None = None

    def derivative(self) -> torch.Tensor:
        """(batch, length, heads, size), as the output."""
        if self._derivative is None:
            self.band(0)
        assert self._derivative is not None
        return self._derivative

    @torch.no_grad()
    def band(self, window: int) -> list[BandBlock]:
        """The blocks of the band of width ``window``, averaged over heads."""
        attended, found, derivatives = self.attended, [], []
        query, key, value = attended.query.detach(), attended.key.detach(), attended.value.detach()
        for span in attended.spans():
            start, stop, low, high = span
            part = query[:, :, start:stop], key[:, :, low:high]
            probability = attended.probability(*part, span)
            if window:
                found.append(_band_block(probability, start, stop, low, window))
            if self.moved is not None:
                derivatives.append(self._moved(self.moved, probability, *part, value[:, :, low:high], span))
        if self.moved is not None:
            self._derivative = torch.cat(derivatives, dim=2).transpose(1, 2)
        return found

    def _moved(
        self,
        moved: Moved,
        probability: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        span: tuple[int, int, int, int],
    ) -> torch.Tensor:
        """With s = q . k and o = sum of p v: o' = sum of p (s' - sum of p s') v + p v', (batch, heads, rows, size)."""
        attended, (start, stop, low, high) = self.attended, span
        slope = attended.products(moved.query[:, :, start:stop], key)
        slope += attended.products(query, moved.key[:, :, low:high])
        if attended.softcap is not None:
            slope *= 1 - torch.tanh(attended.products(query, key) / attended.softcap).square()
        if moved.bias is not None:
            slope += _part(moved.bias, *span)
        # A sink's share of the probability is missing in the sum, as it should be where it has no derivative of its own.
        slope.mul_(probability)
        mean = slope.sum(dim=-1, keepdim=True)
        if moved.sinks is not None:
            mean += (1 - probability.sum(dim=-1, keepdim=True)) * moved.sinks[:, :, start:stop]
        slope.addcmul_(probability, mean, value=-1)
        groups, shape = key.shape[1], (*query.shape[:3], -1)
        found = _grouped(slope.to(value.dtype), groups) @ value
        found += _grouped(probability.to(value.dtype), groups) @ moved.value[:, :, low:high]
        return found.reshape(shape)


def _grouped(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(batch, heads, rows, n) -> (batch, groups, heads / groups * rows, n): query heads beside the key head they share."""
    return rows.reshape(rows.shape[0], groups, -1, rows.shape[3])


def _part(whole: torch.Tensor, start: int, stop: int, low: int, high: int) -> torch.Tensor:
    """Of a mask or bias (batch | 1, heads | 1, queries | 1, keys)."""
    rows = whole if whole.shape[2] == 1 else whole[:, :, start:stop]
    return rows[..., low:high]


def _band_block(probability: torch.Tensor, start: int, stop: int, low: int, window: int) -> BandBlock:
    first = max(low, start - window)
    mean = probability[..., first - low : stop - low].mean(dim=1)
    device = probability.device
    distance = torch.arange(start, stop, device=device)[:, None] - torch.arange(first, stop, device=device)[None]
    return BandBlock(start, stop, first, mean.masked_fill_((distance <= 0) | (distance > window), 0.0))


def apply_band(band: list[BandBlock], error: torch.Tensor) -> torch.Tensor:
    """e_p = sum over 0 < k - p <= W of A[k, p] d_k (Eq. 9).

    ``error`` d: (batch, length, d_v) at the value projection's output. Returns e of the same shape and dtype.
    """
    reached = torch.zeros_like(error)
    for block in band:
        rows = block.probability.to(error.dtype).transpose(1, 2) @ error[:, block.start : block.stop]
        reached[:, block.first : block.stop] += rows
    return reached

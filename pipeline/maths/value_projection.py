"""Which rows of which linear map are a layer's value projection: found by differentiation, not by name.

The attention kernel is handed a value tensor. Its derivative with respect to the outputs of the layer's linear maps is
non-zero at exactly the rows that make it, whatever the layout: a map of its own, a fused query-key-value map with
contiguous blocks, or one interleaved by head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from alphatoken.pipeline.maths.attention import intercepted
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.frozen import frozen
from alphatoken.pipeline.maths.linear_maps import LinearMap
from alphatoken.pipeline.maths.placement import device_of


@dataclass(frozen=True, slots=True)
class ValueProjection:
    """The value projection of one attention module: ``rows`` of ``map``'s output, a slice where they are contiguous."""

    map: LinearMap
    rows: slice | torch.Tensor
    attention: nn.Module

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """The value's part (..., d_v) of a tensor (..., d_out) at the map's output."""
        return output[..., self.rows]


def value_projections(scored: ScoredLayers, kernel: str) -> dict[str, ValueProjection]:
    """The value projections of the scored layers, by the names of their parameters.

    Runs one forward pass over four tokens. A layer has none where no softmax attention goes through transformers'
    attention interface (state-space and linear-attention layers), where the value is made by none of its linear maps (it
    may be another layer's), or where its attention runs several times in one pass: no causal path leads through it.
    """
    outputs: list[tuple[LinearMap, torch.Tensor]] = []
    values: dict[nn.Module, list[torch.Tensor]] = {}
    layer_of = scored.layer_of()

    def listen(module: nn.Module, value: torch.Tensor, band: object) -> None:
        if module in layer_of:
            values.setdefault(module, []).append(value)

    def hook(linear: LinearMap) -> Callable:
        def forward_hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            leaf = output.detach().requires_grad_(True)
            outputs.append((linear, leaf))
            return leaf.clone()

        return forward_hook

    with ExitStack() as stack:
        stack.enter_context(frozen(scored.model))
        stack.enter_context(intercepted(scored.decoder, kernel, listen))
        for linear in scored.maps:
            if not linear.experts:
                stack.callback(linear.module.register_forward_hook(hook(linear)).remove)
        device = device_of(scored.model)
        scored.decoder(input_ids=torch.arange(4, device=device)[None], use_cache=False)
    found = [
        _one(module, seen[0], [(linear, leaf) for linear, leaf in outputs if linear.layer == layer_of[module]])
        for module, seen in values.items()
        if len(seen) == 1
    ]
    return {projection.map.name: projection for projection in found if projection is not None}


def layers_with(projections: Iterable[ValueProjection]) -> int:
    """How many of the scored layers the causal path goes through."""
    return len({projection.map.layer for projection in projections})


def _one(
    attention: nn.Module, value: torch.Tensor, outputs: list[tuple[LinearMap, torch.Tensor]]
) -> ValueProjection | None:
    if not outputs or not value.requires_grad:
        return None
    count = value.shape[1] * value.shape[3]
    ones = torch.ones_like(value)
    ones[:, :, 1:] = 0  # the rows are those of the first position
    gradients = torch.autograd.grad(value, [leaf for _, leaf in outputs], ones, allow_unused=True, retain_graph=True)
    for (linear, _), gradient in zip(outputs, gradients, strict=True):
        if gradient is None:
            continue
        rows = gradient.reshape(-1, gradient.shape[-1])[0].nonzero().squeeze(1)
        if len(rows) == count:
            start = int(rows[0])
            contiguous = bool((rows == torch.arange(start, start + count, device=rows.device)).all())
            return ValueProjection(linear, slice(start, start + count) if contiguous else rows, attention)
    return None

"""Which rows of which linear map are a layer's value projection: found by differentiation, not by name.

The attention kernel is handed a value tensor. Its derivative with respect to the outputs of the layer's linear maps is
non-zero at exactly the rows that make it, whatever the layout: a map of its own, a fused query-key-value map with
contiguous blocks, or one interleaved by head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from alphatoken.pipeline.maths.attention import intercepted
from alphatoken.pipeline.maths.capture import frozen
from alphatoken.pipeline.maths.decoder import LinearMap, ScoredLayers, UnsupportedModel


@dataclass(frozen=True, slots=True)
class ValueProjection:
    """The value projection of one scored layer: ``rows`` of ``map``'s output, a slice where they are contiguous."""

    map: LinearMap
    rows: slice | torch.Tensor

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """The value's part (..., d_v) of a tensor (..., d_out) at the map's output."""
        return output[..., self.rows]


def value_projections(scored: ScoredLayers, kernel: str) -> dict[str, ValueProjection]:
    """The value projection of every scored layer, by the name of its parameter.

    Runs one forward pass over four tokens. Raises UnsupportedModel where a scored layer has no softmax attention that
    goes through transformers' attention interface, or where its value is not made by one of its linear maps.
    """
    outputs: dict[int, list[tuple[LinearMap, torch.Tensor]]] = {i: [] for i in range(len(scored.layers))}
    values: dict[int, torch.Tensor] = {}
    layer_of = scored.layer_of()

    def listen(module: nn.Module, value: torch.Tensor, band: object) -> None:
        if module in layer_of:
            values[layer_of[module]] = value

    def hook(linear: LinearMap) -> Callable:
        def forward_hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            leaf = output.detach().requires_grad_(True)
            outputs[linear.layer].append((linear, leaf))
            return leaf.view_as(leaf)

        return forward_hook

    with ExitStack() as stack:
        stack.enter_context(frozen(scored.model))
        stack.enter_context(intercepted(scored.model, kernel, listen))
        for linear in scored.maps:
            if not linear.experts:
                stack.callback(linear.module.register_forward_hook(hook(linear)).remove)
        device = next(scored.model.parameters()).device
        scored.decoder(input_ids=torch.arange(4, device=device)[None], use_cache=False)
    found = [_one(scored, index, values.get(index), outputs[index]) for index in range(len(scored.layers))]
    return {projection.map.name: projection for projection in found}


def _one(
    scored: ScoredLayers, index: int, value: torch.Tensor | None, outputs: list[tuple[LinearMap, torch.Tensor]]
) -> ValueProjection:
    where = f"{type(scored.model).__name__}, scored layer {index} of {len(scored.layers)}"
    remedy = "score without the causal path (valuation.window=0), or score fewer layers (valuation.layers)"
    if value is None:
        raise UnsupportedModel(f"{where}: no softmax attention through transformers' attention interface; {remedy}")
    count = value.shape[1] * value.shape[3]
    ones = torch.ones_like(value)
    ones[:, :, 1:] = 0  # the rows are those of the first position
    gradients = torch.autograd.grad(value, [leaf for _, leaf in outputs], ones, allow_unused=True) if outputs else ()
    for (linear, _), gradient in zip(outputs, gradients, strict=True):
        if gradient is None:
            continue
        rows = gradient.reshape(-1, gradient.shape[-1])[0].nonzero().squeeze(1)
        if len(rows) == count:
            start = int(rows[0])
            contiguous = bool((rows == torch.arange(start, start + count, device=rows.device)).all())
            return ValueProjection(linear, slice(start, start + count) if contiguous else rows)
    raise UnsupportedModel(f"{where}: its attention's value is not made by one of its linear maps; {remedy}")

"""Low-rank adapters on the linear maps of decoder layers: what `trial.train=lora` and `anchor.unroll.train=lora` train.

y = W x + SCALE * B (A x)      A: (rank, d_in), drawn by the seed, uniform within 1 / sqrt(d_in); B: (d_out, rank), from 0 on

Stacked experts have none: their matrices are many, and each meets few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel, decoder_layers, scored_layers
from alphatoken.pipeline.maths.frozen import frozen
from alphatoken.pipeline.maths.learners import Weights
from alphatoken.pipeline.maths.linear_maps import LinearMap
from alphatoken.pipeline.maths.whole_pass import Weigh, whole_pass

SCALE = 2.0
DOWN, UP = "lora_A", "lora_B"


def all_layers(model: nn.Module) -> ScoredLayers:
    """Every decoder layer of a model as scored ones. Raises UnsupportedModel."""
    return scored_layers(model, len(decoder_layers(model)[1]))


def adapted(scored: ScoredLayers) -> tuple[list[LinearMap], list[LinearMap]]:
    """The maps that get adapters, and the stacked ones that do not."""
    return [m for m in scored.maps if not m.experts], [m for m in scored.maps if m.experts]


def adapter_weights(scored: ScoredLayers, rank: int) -> int:
    """How many numbers adapters of one ``rank`` have."""
    return rank * sum(sum(one.parameter.shape) for one in adapted(scored)[0])


class Adapters:
    """Trained adapters of one ``rank`` on the scored maps. Raises UnsupportedModel where none fits."""

    def __init__(self, scored: ScoredLayers, rank: int, seed: int) -> None:
        self.scored = replace(scored, shared=False)  # lower layers learn as well
        self._maps = adapted(scored)[0]
        if not self._maps:
            raise UnsupportedModel(
                f"{type(scored.model).__name__}: every linear map is one of stacked experts, which get no adapters: train "
                "weights (trial.train=layers, anchor.unroll.train=weights)"
            )
        generator = torch.Generator().manual_seed(seed)
        self._start: dict[str, torch.Tensor] = {}
        for one in self._maps:
            weight = one.parameter
            outputs, inputs = weight.shape[::-1] if one.transposed else weight.shape
            drawn = (2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5
            wide = torch.promote_types(weight.dtype, torch.float32)
            self._start[f"{one.name}.{DOWN}"] = drawn.to(weight.device, wide)
            self._start[f"{one.name}.{UP}"] = torch.zeros(outputs, rank, dtype=wide, device=weight.device)
        self._held: dict[str, torch.Tensor] = {}

    @cached_property
    def gradient(self) -> dict[str, torch.Tensor]:
        """See Learner."""
        return {name: torch.zeros_like(tensor) for name, tensor in self._start.items()}

    @contextmanager
    def leaves(self) -> Iterator[Weights]:
        """See Trained."""
        yield self._held

    def merged(self, weights: Weights) -> dict[str, torch.Tensor]:
        """See Trained."""
        found = {one.name: one.parameter.detach() for one in self.scored.maps}
        for one in self._maps:
            down, up = weights[f"{one.name}.{DOWN}"], weights[f"{one.name}.{UP}"]
            product = SCALE * (up @ down)
            found[one.name] = found[one.name].to(product.dtype) + (product.T if one.transposed else product)
        return found

    def start(self) -> dict[str, torch.Tensor]:
        """See Learner."""
        return dict(self._start)

    def clear(self) -> None:
        """See Learner."""
        for total in self.gradient.values():
            total.zero_()

    @contextmanager
    def holding(self, weights: Weights) -> Iterator[None]:
        """See Learner."""
        held = {name: weights[name].detach().requires_grad_() for name in self._start}

        def beside(name: str) -> Callable[..., torch.Tensor]:
            down, up = held[f"{name}.{DOWN}"], held[f"{name}.{UP}"]

            def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
                entering = args[0]
                inner = linear(entering, down.to(entering.dtype))
                return output + SCALE * linear(inner, up.to(entering.dtype))

            return hook

        before, self._held = self._held, held
        try:
            with ExitStack() as stack:
                for one in self._maps:
                    stack.callback(one.module.register_forward_hook(beside(one.name)).remove)
                yield
        finally:
            self._held = before

    def backward(self, batch: Batch, kernel: str, weigh: Weigh | None = None) -> torch.Tensor:
        """See Learner."""
        with frozen(self.scored.model):
            losses = whole_pass(self.scored, batch, kernel, weigh)
        for name, leaf in self._held.items():
            if leaf.grad is not None:
                self.gradient[name] += leaf.grad
                leaf.grad = None
        return losses

"""What of a model a trial or a simulated run trains: the scored weights, or every weight by whole passes.

A learner never changes the model: weights are put into it for one block of code. Adapters are a third (adapters.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch

from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.capture import Captured, swapped
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.frozen import frozen
from alphatoken.pipeline.maths.ghost import read_pass
from alphatoken.pipeline.maths.head import Predictions
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.whole_pass import Weigh, whole_pass

READ = [Predictions.losses]
Weights = Mapping[str, torch.Tensor]


class Learner(Protocol):
    """``scored``: the model as its passes run it; ``scored.shared``: whether they go on from what enters the scored layers.

    ``gradient``: by name, summed over the passes since ``clear``, at least float32.
    """

    scored: ScoredLayers

    @property
    def gradient(self) -> dict[str, torch.Tensor]:
        """See above; there is room for it from the first look at it."""

    def start(self) -> dict[str, torch.Tensor]:
        """What learns, by name, as it is before the first step."""

    def clear(self) -> None:
        """Begin another step."""

    def holding(self, weights: Weights) -> AbstractContextManager[None]:
        """The model with these weights, for one block of code."""

    def backward(self, batch: Batch, kernel: str, weigh: Weigh | None = None) -> torch.Tensor:
        """Losses (n,) of the model that is held, nats; adds the gradient of their sum, each times ``weigh(losses)``."""


class Trained(Learner, Protocol):
    """A learner that a simulated run trains: a sweep goes back over what it did."""

    def leaves(self) -> AbstractContextManager[Weights]:
        """The tensors that the model with the held weights computes with; they require gradients in the block of code."""

    def merged(self, weights: Weights) -> dict[str, torch.Tensor]:
        """The scored weights, as the model stores them, to which ``weights`` amount; can be differentiated by them."""


class ScoredWeights:
    """The linear maps of the scored layers, by ghost passes: lower layers run without a graph, or not at all.

    ``rounded``: see OuterSum.
    """

    def __init__(self, scored: ScoredLayers, rounded: bool = True) -> None:
        self.scored, self._rounded = scored, rounded
        self._last = max((one.layer for one in scored.maps), default=0)

    @cached_property
    def _sum(self) -> OuterSum:
        return OuterSum(self.scored, rounded=self._rounded)

    @property
    def gradient(self) -> dict[str, torch.Tensor]:
        """See Learner."""
        return self._sum.total

    @contextmanager
    def leaves(self) -> Iterator[Weights]:
        """See Trained."""
        parameters = {one.name: one.parameter for one in self.scored.maps}
        try:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            yield parameters
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)

    def merged(self, weights: Weights) -> dict[str, torch.Tensor]:
        """See Trained."""
        return dict(weights)

    def start(self) -> dict[str, torch.Tensor]:
        """See Learner."""
        return self.scored.weights()

    def clear(self) -> None:
        """See Learner."""
        for total in self.gradient.values():
            total.zero_()

    def holding(self, weights: Weights) -> AbstractContextManager[None]:
        """See Learner."""
        return swapped(self.scored, dict(weights))

    def backward(self, batch: Batch, kernel: str, weigh: Weigh | None = None) -> torch.Tensor:
        """See Learner."""
        return read_pass(self.scored, batch, READ, self._add, {}, kernel, weigh=weigh)[0]

    def _add(self, captured: Captured) -> None:
        """In the last layer most positions have no error: what they put out goes into no prediction that is learned from."""
        if captured.map.layer == self._last:
            reached = captured.error.any(dim=1).nonzero().squeeze(1)
            if 4 * len(reached) < 3 * len(captured.error):
                captured = replace(captured, entering=captured.entering[reached], error=captured.error[reached])
        self._sum(captured)


class EveryWeight:
    """Every floating-point weight of the decoder and of the head, embeddings and gains included, by whole passes."""

    def __init__(self, scored: ScoredLayers) -> None:
        self.scored = replace(scored, shared=False)  # lower layers learn as well
        head: Any = scored.model.get_output_embeddings()  # type: ignore[operator]  # an nn.Module to mypy
        parts = [scored.decoder, *([head] if head is not None else [])]
        own = {id(p) for part in parts for p in part.parameters() if p.is_floating_point()}
        self._parameters = {name: p for name, p in scored.model.named_parameters() if id(p) in own}

    @cached_property
    def gradient(self) -> dict[str, torch.Tensor]:
        """See Learner."""
        return {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in self._parameters.items()}

    def start(self) -> dict[str, torch.Tensor]:
        """See Learner."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def clear(self) -> None:
        """See Learner."""
        for total in self.gradient.values():
            total.zero_()

    @contextmanager
    def holding(self, weights: Weights) -> Iterator[None]:
        """See Learner."""
        before = {name: parameter.data for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = weights[name].to(parameter.device, parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = before[name]

    def backward(self, batch: Batch, kernel: str, weigh: Weigh | None = None) -> torch.Tensor:
        """See Learner."""
        with frozen(self.scored.model):
            for parameter in self._parameters.values():
                parameter.requires_grad_(True)
            try:
                losses = whole_pass(self.scored, batch, kernel, weigh)
            finally:
                for name, parameter in self._parameters.items():
                    parameter.requires_grad_(False)
                    if parameter.grad is not None:
                        self.gradient[name] += parameter.grad
                        parameter.grad = None
        return losses


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)

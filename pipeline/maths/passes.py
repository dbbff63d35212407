"""The passes of one step of a simulated run, or of the sweep over it: the unit of work, whoever makes them.

A step's gradient is a sum over its passes, and so is H r. What each gives is added pass after pass, in their order, so that the
numbers do not depend on who has made which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.learners import Trained, Weights
from alphatoken.pipeline.maths.second_order import Curvature, curvature_pass

AT_ONCE = 8  # passes of a gradient that are shared: what helpers make of them is held until it is added
GRADIENT = ""  # stands for a direction where the gradient itself is made

# Called with a direction's name or GRADIENT, a weight's name, and what a pass adds to H r or to the gradient.
Visitor = Callable[[str, str, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class StepWork:
    """One step. ``directions``: name -> weight -> r, along which H r and the tokens' derivatives are made; None: the gradient.

    Both are of the SUM of the losses, at ``weights``.
    """

    weights: Weights
    passes: Sequence[Batch]
    directions: Mapping[str, Weights] | None
    kernel: str

    def made(self, learner: Trained, number: int, visit: Visitor) -> Curvature:
        """Make one pass; the learner holds ``weights``. What it adds is shown to ``visit``, and not held here."""
        if self.directions is not None:
            return curvature_pass(learner, self.passes[number], self.directions, visit)
        learner.clear()
        losses = learner.backward(self.passes[number], self.kernel)
        for name, gradient in learner.gradient.items():
            visit(GRADIENT, name, gradient)
        return Curvature(losses, {})


class Passes(Protocol):
    """Makes all passes of a step."""

    def __call__(self, learner: Trained, work: StepWork, visit: Visitor) -> list[Curvature]:
        """Of every pass; ``visit`` is shown what they add in the passes' order."""


def summed_gradient(
    learner: Trained, weights: Weights, batches: Sequence[Batch], kernel: str, passes: Passes
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The gradient of the SUM of all losses, in at least float32, and the losses (n,) of every pass."""
    total = {n: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for n, w in weights.items()}

    def add(direction: str, name: str, gradient: torch.Tensor) -> None:
        total[name] += gradient

    losses = []
    for start in range(0, len(batches), AT_ONCE):
        work = StepWork(weights, batches[start : start + AT_ONCE], None, kernel)
        losses += [one.losses for one in passes(learner, work, add)]
    return total, losses


def alone(learner: Trained, work: StepWork, visit: Visitor) -> list[Curvature]:
    """As Passes: here, one after the other."""
    with learner.holding(work.weights):
        return [work.made(learner, number, visit) for number in range(len(work.passes))]

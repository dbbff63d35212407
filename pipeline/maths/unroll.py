"""The unrolled direction: the adjoint of a simulated training run (method.md; MAGIC, arXiv 2504.16430).

For an objective J(W_T), with P_t and c_t held constant, the sweep goes back through the run:

    lambda = grad J(W_T), mu = 0;  for t = T-1 .. 0:   mu -= P_t * lambda;   r_t = (1 - b1) c_t mu;
                                                        lambda += H_t r_t;    mu = b1 mu

Minus the derivative of J by the weight of token i of batch t in the loss is -1/N_t <grad l_i(W_t) - g_t, r_t>: a Ghost
Dot-Product with the direction -r_t at the weights W_t. Several objectives share one sweep. Where adapters are trained in
the place of W, everything is of them; ``pulled`` and ``pushed`` lead there from the scored weights, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.learners import Trained, Weights
from alphatoken.pipeline.maths.passes import Passes, StepWork, alone, summed_gradient
from alphatoken.pipeline.maths.simulated import Descent, Diverged, Taped, Tensors

SWEPT_TOKENS = 1024


@dataclass(slots=True)
class Adjoint:
    """Of one objective: ``weights`` lambda and ``momentum`` mu by parameter name, changed in place by the sweep.

    Between two steps mu stands as the step above left it, before it decays: r_t is a multiple of it.
    """

    weights: Tensors
    momentum: Tensors

    @classmethod
    def at_the_end(cls, gradient: Mapping[str, torch.Tensor]) -> Adjoint:
        """Before the sweep: ``gradient`` is that of J at W_T, in at least float32."""
        own = {name: tensor.clone() for name, tensor in gradient.items()}
        return cls(own, {name: torch.zeros_like(tensor) for name, tensor in own.items()})


@dataclass(frozen=True, slots=True)
class Swept:
    """One step t of the sweep, as ``found`` is shown it.

    ``values``: objective -> (n,), minus the derivative of J by the weight of each labelled token of batch t, nats, in the
    order of the batch's passes and their ``predicting()``; above 0: learning the token lowers J. ``losses`` (n,).
    ``adjoints``, ``factor``: what ``residuals`` is made of. ``weights``: W_t.
    """

    values: dict[str, torch.Tensor]
    losses: torch.Tensor
    adjoints: Mapping[str, Adjoint]
    factor: float
    weights: Tensors

    def residuals(self) -> dict[str, Tensors]:
        """Objective -> r_t by parameter name; while this step is the sweep's last, since it is made of the adjoints."""
        return {
            objective: {name: self.factor * mu for name, mu in adjoint.momentum.items()}
            for objective, adjoint in self.adjoints.items()
        }


def sweep(
    learner: Trained,
    descent: Descent,
    batches: Sequence[Sequence[Batch]],
    tape: Callable[[int], Taped],
    adjoints: Mapping[str, Adjoint],
    found: Callable[[int, Swept], None],
    start: int | None = None,
    passes: Passes = alone,
) -> None:
    """Go back over the steps below ``start`` (None: all of them), ``adjoints`` being those after it.

    ``tape(t)``: the step as ``simulate`` kept it. ``found(t, swept)`` is called when ``adjoints`` are those before step t.
    ``passes`` makes the passes of a step. The model itself stays as it is. Raises Diverged naming the step.
    """
    decay = descent.decay
    for step in reversed(range(len(batches) if start is None else start)):
        taped = tape(step)
        for adjoint in adjoints.values():
            for name, tensor in adjoint.weights.items():
                adjoint.momentum[name].mul_(decay).sub_(taped.scaled(name, tensor))
        # r_t = factor * mu, so that no residual is held: products and derivatives along mu are scaled.
        factor, tokens = (1 - decay) * taped.clip, max(1, taped.tokens)
        directions = {objective: adjoint.momentum for objective, adjoint in adjoints.items()}

        def add(objective: str, name: str, product: torch.Tensor, share: float = factor / tokens) -> None:
            adjoints[objective].weights[name].add_(product, alpha=share)

        few = [some for batch in batches[step] for some in few_rows(batch)]
        each = passes(learner, StepWork(taped.weights, few, directions, ""), add)
        _check(adjoints, step, len(batches))
        along = {o: factor * torch.cat([one.along[o] for one in each]) for o in adjoints}
        values = {o: (one.mean() - one) / tokens for o, one in along.items() if len(one)}
        losses = torch.cat([one.losses for one in each])
        found(step, Swept(values, losses, adjoints, factor, taped.weights))


def few_rows(batch: Batch) -> list[Batch]:
    """A batch in parts of consecutive rows of at most SWEPT_TOKENS padded tokens, or of one row: a pass over a pass holds
    several times what a training step does."""
    rows, length = batch.shape
    each = max(1, SWEPT_TOKENS // length)
    return [batch.rows(slice(start, start + each)) for start in range(0, rows, each)]


def loss_gradient(
    learner: Trained, weights: Weights, batches: Sequence[Batch], kernel: str, passes: Passes = alone
) -> tuple[Tensors, float, int]:
    """The gradient of the mean loss over all labelled tokens by ``weights``, that loss in nats, and the number of tokens.

    All positions enter, the prompt's as well: it is the derivative itself, not the paper's pairing. ``passes`` makes the passes.
    """
    total, losses = summed_gradient(learner, weights, batches, kernel, passes)
    loss, tokens = sum(float(one.double().sum()) for one in losses), sum(map(len, losses))
    return {name: tensor / max(1, tokens) for name, tensor in total.items()}, loss / max(1, tokens), tokens


def pulled(learner: Trained, weights: Weights, gradient: Mapping[str, torch.Tensor]) -> Tensors:
    """The gradient by ``weights`` of what has ``gradient`` by the scored weights to which they amount."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
    with torch.enable_grad():
        moved = {name: one for name, one in learner.merged(leaves).items() if one.requires_grad}
    ends = [gradient[name].to(one) for name, one in moved.items()]
    return dict(zip(leaves, torch.autograd.grad(list(moved.values()), list(leaves.values()), ends), strict=True))


def pushed(learner: Trained, weights: Weights, direction: Mapping[str, torch.Tensor]) -> Tensors:
    """How the scored weights to which ``weights`` amount move where those move along ``direction``."""
    return torch.func.jvp(learner.merged, (dict(weights),), (dict(direction),))[1]


def _check(adjoints: Mapping[str, Adjoint], step: int, steps: int) -> None:
    for objective, adjoint in adjoints.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in adjoint.weights.values()):
            raise Diverged(f"NaN or infinity in the sweep back for {objective} at step {step + 1} of {steps}")

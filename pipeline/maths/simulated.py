"""A simulated training run of the scored weights or of adapters on them, and the tape of it that a sweep back needs.

    g_t = 1/N_t sum over the labelled tokens of batch t of grad l_i(W_t)
    m_{t+1} = b1 m_t + (1 - b1) c_t g_t,     W_{t+1} = W_t - P_t * m_{t+1}

plain gradient descent: b1 = 0, P_t the learning rate; momentum: b1 = 0.9; Adam: P_t = lr_t / (1 - b1^{t+1}) /
(sqrt(v_{t+1} / (1 - b2^{t+1})) + eps), elementwise. c_t clips the gradient to norm 1. The learning rate is that of the
warm-up (linear rise, cosine to zero).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.learners import Trained
from alphatoken.pipeline.maths.nonfinite import locate
from alphatoken.pipeline.maths.passes import Passes, alone, summed_gradient
from alphatoken.pipeline.maths.warmup import schedule

KINDS = ("sgd", "momentum", "adam")
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
CLIPPED_TO = 1.0

Tensors = dict[str, torch.Tensor]


class Diverged(ArithmeticError):
    """NaN or infinity in a simulated run or in the sweep over it; the message names the step."""


@dataclass(frozen=True, slots=True)
class Descent:
    """How the simulated run descends: ``kind`` of KINDS, peak ``learning_rate``, number of ``steps`` of the whole run."""

    kind: str
    learning_rate: float
    steps: int

    @property
    def decay(self) -> float:
        """b1 of the momentum."""
        return 0.0 if self.kind == "sgd" else BETA1


@dataclass(frozen=True, slots=True)
class Taped:
    """One step t of the run: W_t by parameter name, P_t (elementwise, or one number for all), c_t and N_t."""

    weights: Tensors
    scale: Tensors | float
    clip: float
    tokens: int

    def scaled(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """P_t * tensor."""
        return tensor * (self.scale if isinstance(self.scale, float) else self.scale[name].to(tensor))


class SimulatedRun:
    """Masters of the weights that learn, in at least float32, and the optimizer's moments.

    ``start``: steps done and the state that ``state`` gave then, to go on from there to the same numbers.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], descent: Descent, start: tuple[int, Tensors] | None = None
    ) -> None:
        self.descent, self.done = descent, 0
        wide = {name: w.detach().to(torch.promote_types(w.dtype, torch.float32)) for name, w in weights.items()}
        kinds = {"sgd": ["master"], "momentum": ["master", "mean"], "adam": ["master", "mean", "square"]}[descent.kind]
        self._kept: dict[str, Tensors] = {}
        for kind in kinds:
            if start is not None:
                self._kept[kind] = {name: start[1][f"{kind}/{name}"].to(w).clone() for name, w in wide.items()}
            else:
                self._kept[kind] = {n: w.clone() if kind == "master" else torch.zeros_like(w) for n, w in wide.items()}
        if start is not None:
            self.done = start[0]

    def masters(self) -> Tensors:
        """W_t; not copies."""
        return self._kept["master"]

    def state(self) -> Tensors:
        """Masters and moments, by ``<kind>/<parameter name>``; not copies."""
        return {f"{kind}/{name}": tensor for kind, kept in self._kept.items() for name, tensor in kept.items()}

    def step(self, gradient: Tensors, tokens: int) -> Taped:
        """One step along ``gradient``, a sum over ``tokens``; returns it, with copies."""
        descent, step = self.descent, self.done
        mean = {name: tensor / max(1, tokens) for name, tensor in gradient.items()}
        norm = math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in mean.values()))
        clip = min(1.0, CLIPPED_TO / (norm + 1e-6))
        before = {name: master.clone() for name, master in self.masters().items()}
        rate = descent.learning_rate * schedule(step, descent.steps)
        scales: Tensors = {}
        for name, master in self.masters().items():
            clipped = clip * mean[name]
            moment = clipped
            if descent.kind != "sgd":
                moment = self._kept["mean"][name].mul_(BETA1).add_(clipped, alpha=1 - BETA1)
            if descent.kind == "adam":
                square = self._kept["square"][name].mul_(BETA2).addcmul_(clipped, clipped, value=1 - BETA2)
                root = (square / (1 - BETA2 ** (step + 1))).sqrt_().add_(EPSILON)
                scales[name] = root.reciprocal_().mul_(rate / (1 - BETA1 ** (step + 1)))
                master.addcmul_(scales[name], moment, value=-1)
            else:
                master.add_(moment, alpha=-rate)
        self.done += 1
        return Taped(before, scales or rate, clip, tokens)


def simulate(
    learner: Trained,
    run: SimulatedRun,
    batches: Sequence[Sequence[Batch]],
    kernel: str,
    keep: Callable[[int, Taped], None],
    stop: int | None = None,
    after: Callable[[int], None] = lambda done: None,
    passes: Passes = alone,
) -> None:
    """Take ``run`` from where it stands to ``stop`` steps (None: the end). The model itself stays as it is.

    ``batches``: of every step the passes that make up its batch, summed in order; ``passes`` makes them. ``keep(t, taped)`` is
    called after each step, then ``after(steps done)``. Raises Diverged naming the step.
    """
    for step in range(run.done, len(batches) if stop is None else stop):
        total, losses = summed_gradient(learner, run.masters(), batches[step], kernel, passes)
        for batch, one in zip(batches[step], losses, strict=True):
            if not bool(torch.isfinite(one).all()):
                with learner.holding(run.masters()):
                    raise Diverged(f"step {step + 1} of {len(batches)}: {locate(learner.scored, batch, kernel)}")
        _check(total, f"step {step + 1} of {len(batches)}: NaN or infinity in the gradient")
        taped = run.step(total, sum(map(len, losses)))
        # Named by the step that would start from them, as where its first pass shows it; the tape could not hold them.
        where = f"step {step + 2} of {len(batches)}" if step + 1 < len(batches) else "the end of the run"
        _check(run.masters(), f"{where}: NaN or infinity in the weights")
        keep(step, taped)
        after(step + 1)


def _check(tensors: Tensors, said: str) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise Diverged(said)

"""Warm-up: a few AdamW steps on the scored modules alone, so that there is a drift to measure stability by.

Weight gradients come from the ghost pass (the sum of d h^T is the gradient), so lower layers run without autograd and
the optimizer holds state for K layers only. Master weights are float32 whatever the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from alphatoken.pipeline.maths.adamw import ScoredAdamW
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.nonfinite import locate
from alphatoken.pipeline.maths.outer_sums import OuterSum


def warm_up(
    scored: ScoredLayers,
    batches: Sequence[Batch],
    learning_rate: float,
    kernel: str,
    advance: Callable[[int], None],
    keep: Callable[[int, dict[str, torch.Tensor]], None] = lambda step, masters: None,
    save: Callable[[int, dict[str, torch.Tensor]], None] = lambda step, state: None,
    start: tuple[int, dict[str, torch.Tensor]] | None = None,
) -> dict[str, torch.Tensor]:
    """Train the scored weights in place, one AdamW step per batch; returns their float32 masters by parameter name.

    ``keep(steps, masters)`` is called before the first step (0) and after each, with the steps done so far.
    ``save(steps, state)`` is called after ``keep``: all that is needed to go on from there, as ``start``, to the same
    numbers.

    The step's loss is the mean over the batch's response tokens; the learning rate rises over the first tenth of the
    steps and falls to zero along a cosine; gradients are clipped to norm 1. ``advance`` is called with 1 after a step.
    """
    adamw = ScoredAdamW(scored.weights(), learning_rate, start)
    first = 0
    if start is None:
        keep(0, adamw.masters())
    else:
        first = start[0]
        _copy_to_model(scored, adamw.masters())
        advance(first)
    for step, batch in enumerate(batches[first:], first):
        gradient = OuterSum(scored)
        losses = ghost_pass(scored, batch, gradient, kernel)
        if not bool(torch.isfinite(losses).all()):
            raise locate(scored, batch, kernel)
        adamw.step(gradient.total, len(losses), schedule(step, len(batches)))
        _copy_to_model(scored, adamw.masters())
        keep(step + 1, adamw.masters())
        save(step + 1, adamw.state())
        advance(1)
    return adamw.masters()


def snapshot_steps(steps: int, snapshots: int) -> list[int]:
    """After how many of ``steps`` steps each snapshot is taken: evenly from the start to the end; one: the end."""
    if snapshots == 1:
        return [steps]
    return [round(index * steps / (snapshots - 1)) for index in range(snapshots)]


@torch.no_grad()
def _copy_to_model(scored: ScoredLayers, masters: dict[str, torch.Tensor]) -> None:
    for linear in scored.maps:
        linear.parameter.copy_(masters[linear.name])


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor of step ``step`` of ``steps``: linear rise over the first tenth, then a cosine to zero."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

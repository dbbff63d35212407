"""Warm-up: a few AdamW steps on the scored modules alone, so that there is a drift to measure stability by.

Weight gradients come from the ghost pass (the sum of d h^T is the gradient), so lower layers run without autograd and
the optimizer holds state for K layers only. Master weights are float32 whatever the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from pipeline.maths.batch import Batch
from pipeline.maths.decoder import ScoredLayers
from pipeline.maths.ghost import ghost_pass
from pipeline.maths.nonfinite import locate
from pipeline.maths.outer_sums import OuterSum


def warm_up(
    scored: ScoredLayers,
    batches: Sequence[Batch],
    learning_rate: float,
    kernel: str,
    advance: Callable[[int], None],
    keep: Callable[[int, dict[str, torch.Tensor]], None] = lambda step, masters: None,
) -> dict[str, torch.Tensor]:
    """Train the scored weights in place, one AdamW step per batch; returns their float32 masters by parameter name.

    ``keep(steps, masters)`` is called before the first step (0) and after each, with the steps done so far.

    The step's loss is the mean over the batch's response tokens; the learning rate rises over the first tenth of the
    steps and falls to zero along a cosine; gradients are clipped to norm 1. ``advance`` is called with 1 after a step.
    """
    masters = {name: torch.nn.Parameter(w.detach().float().clone()) for name, w in scored.weights().items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=learning_rate, weight_decay=0.0)
    keep(0, _plain(masters))
    for step, batch in enumerate(batches):
        gradient = OuterSum(scored)
        losses = ghost_pass(scored, batch, gradient, kernel)
        if not bool(torch.isfinite(losses).all()):
            raise locate(scored, batch, kernel)
        for name, master in masters.items():
            master.grad = gradient.total[name].float() / max(1, len(losses))
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, len(batches))
        optimizer.step()
        with torch.no_grad():
            for linear in scored.maps:
                linear.parameter.copy_(masters[linear.name])
        keep(step + 1, _plain(masters))
        advance(1)
    return _plain(masters)


def snapshot_steps(steps: int, snapshots: int) -> list[int]:
    """After how many of ``steps`` steps each snapshot is taken: evenly from the start to the end; one: the end."""
    if snapshots == 1:
        return [steps]
    return [round(index * steps / (snapshots - 1)) for index in range(snapshots)]


def _plain(masters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: master.detach() for name, master in masters.items()}


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor of step ``step`` of ``steps``: linear rise over the first tenth, then a cosine to zero."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

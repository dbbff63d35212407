"""The engine and the oracle on the same models and sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alphatoken.pipeline.maths import attention
from alphatoken.pipeline.maths.batch import IGNORED, Batch, collate
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.outer_sums import OuterSum
from tests.maths import pairwise

COLUMNS = (
    "adaptation_direct", "adaptation_causal", "stability_direct", "stability_causal", "information", "loss", "entropy",
    "gradient_norm",
)  # fmt: skip
# Root-mean-square norms compute in float32 whatever the model's dtype, and forward mode rounds other products.
LEAST_RELATIVE = {"information": 1e-6}


@dataclass(frozen=True)
class Sequences:
    """Unpadded ids and labels."""

    ids: list[list[int]]
    labels: list[list[int]]

    def batch(self) -> Batch:
        return collate(self.ids, self.labels)


def sequences(lengths: Sequence[int], seed: int, vocabulary: int = 61, gaps: bool = True) -> Sequences:
    """Random ids; a prompt of about a third, then the response, with -100 here and there inside it as in a dialogue."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = [], []
    for length in lengths:
        tokens = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = max(1, length // 3)
        skipped = {prompt + 2, prompt + 3} if gaps and length > prompt + 5 else set()
        ids.append(tokens)
        labels.append([IGNORED if i < prompt or i in skipped else token for i, token in enumerate(tokens)])
    return Sequences(ids, labels)


def validation_gradient(model: nn.Module, layers: int, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """G = (1 / N_val) sum over predicting positions of d h^T."""
    scored = scored_layers(model, layers)
    gradient, count = OuterSum(scored), 0
    for batch in batches:
        gradient.positions = batch.predicting()
        count += len(ghost_pass(scored, batch, gradient))
    return {name: total / count for name, total in gradient.total.items()}


def diagonal_fisher(reference: nn.Module, layers: int, completions: Sequences) -> dict[str, torch.Tensor]:
    """F = mean over prompts of the sum over positions of d^2 (h^2)^T."""
    scored = scored_layers(reference, layers)
    squares = OuterSum(scored, squared=True)
    ghost_pass(scored, completions.batch(), squares)
    return {name: total / len(completions.ids) for name, total in squares.total.items()}


def directions(
    policy: nn.Module, reference: nn.Module, layers: int, validation: Sequence[Sequences], completions: Sequences
) -> Directions:
    """Both directions as the engine makes them; validation in as many batches as there are."""
    gradient = validation_gradient(policy, layers, [part.batch() for part in validation])
    fisher = diagonal_fisher(reference, layers, completions)
    old = scored_layers(reference, layers).weights()
    weights = scored_layers(policy, layers).weights()
    return Directions({"adaptation": gradient, "stability": {n: fisher[n] * (w - old[n]) for n, w in weights.items()}})


def the_same_twice(direction: dict[str, torch.Tensor]) -> Directions:
    """Both directions, where the test cares for one."""
    return Directions({"adaptation": direction, "stability": direction})


def without_drift(adaptation: dict[str, torch.Tensor]) -> Directions:
    """A direction of adaptation, and stability that goes nowhere."""
    return Directions({"adaptation": adaptation, "stability": {n: torch.zeros_like(t) for n, t in adaptation.items()}})


@dataclass(frozen=True)
class Expected:
    """What the oracle says of one sequence: by network position, by token, and all that it recorded."""

    positions: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]
    recorded: pairwise.Recorded


def expected(
    policy: nn.Module,
    reference: nn.Module,
    layout: pairwise.Layout,
    layers: int,
    train: Sequences,
    validation: Sequence[Sequences],
    completions: Sequences,
    window: int,
) -> list[Expected]:
    """The oracle's values of every train sequence."""
    new, old = pairwise.oracle(policy), pairwise.oracle(reference)

    def record(twin: nn.Module, some: Sequences) -> list[pairwise.Recorded]:
        pairs = zip(some.ids, some.labels, strict=True)
        return [pairwise.record(twin, layout, layers, ids, labels) for ids, labels in pairs]

    drift = pairwise.fisher_drift(new, old, layout, record(old, completions))
    against = [one for part in validation for one in record(new, part)]
    direction, found = pairwise.adaptation(against), []
    for ids, one in zip(train.ids, record(new, train), strict=True):
        positions = pairwise.position_values(new.config, layout, one, against, drift, window)
        positions |= pairwise.prediction_values(one, pairwise.moved_logits(new, layout, layers, ids, direction))
        found.append(Expected(positions, pairwise.token_values(positions, one), one))
    return found


def assert_same(
    found: dict[str, torch.Tensor], wanted: Sequence[dict[str, torch.Tensor]], relative: float, left: bool = False
) -> None:
    """Every column of every row within ``relative`` of the column's largest value; padding is exactly zero."""
    assert tuple(found) == COLUMNS
    for name in COLUMNS:
        scale = max(float(row[name].abs().max()) for row in wanted)
        assert scale > 0, f"{name} is zero everywhere: the test cannot fail"
        for index, row in enumerate(wanted):
            length = len(row[name])
            values = found[name][index].double()
            own, padding = (values[-length:], values[:-length]) if left else (values[:length], values[length:])
            error = float((own - row[name]).abs().max()) / scale
            assert error < max(relative, LEAST_RELATIVE.get(name, 0.0)), (
                f"{name}, row {index}: off by {error:.2e} of the largest value"
            )
            assert not padding.any(), f"{name}, row {index}: padding has a value"
            assert not own[row["loss"] == 0].any(), f"{name}, row {index}: a value outside the response"


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs")


def state(model: Any) -> dict[str, Any]:
    """Everything that a call could leave behind."""
    found: dict[str, Any] = {"attention": model.config._attn_implementation, "active": dict(attention._active.__dict__)}
    found["experts"] = getattr(model.config, "_experts_implementation", None)
    for name, module in model.named_modules():
        hooks = tuple(len(getattr(module, kind)) for kind in HOOKS)
        found[name] = (
            type(module),
            module.training,
            hooks,
            sorted(module.__dict__),
            id(module.__dict__.get("forward")),
        )
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = (parameter.requires_grad, parameter.data_ptr(), parameter.grad is None)
    return found

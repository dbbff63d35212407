"""The oracle: what the columns should be, by plain autograd on the untouched model, one unpadded sequence at a time.

Nothing of the engine is run here. Names of the scored weights are taken from it, and rows of value projections, which it
finds by differentiation (value_projection.py); everything else is the model's own forward in the attention
implementation that it would itself use, autograd through it and hooks on its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Direction = Mapping[str, torch.Tensor]
DIRECTIONS = ("adaptation", "stability")
STEP = 1e-5  # of the finite difference where a backward pass cannot be differentiated


class NotText(ValueError):
    """The model does not run on text alone; the message is its own."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What is scored: parameter name -> module, whether stored (d_in, d_out), and how many experts it stacks."""

    modules: Mapping[str, str]
    transposed: Mapping[str, bool]
    experts: Mapping[str, int]
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Columns (T,) of one sequence by name at the tokens' own index, and what they could not be compared for.

    ``sums``: direction -> <gradient of the summed loss, M>. ``inputs``, ``errors``: by parameter, (T, d), of single maps
    that were called once for every position. ``unused``: scored weights that the loss does not depend on.
    """

    columns: dict[str, torch.Tensor]
    sums: dict[str, float]
    inputs: dict[str, torch.Tensor]
    errors: dict[str, torch.Tensor]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The model's own logits (T, V) of one sequence. Raises NotText."""
    with sdpa_kernel(SDPBackend.MATH):  # the one whose backward can be differentiated
        return model(input_ids=ids[None], use_cache=False).logits[0]


def runs_on_text(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits without a graph. Raises NotText with the model's own reason."""
    try:
        with torch.no_grad():
            found = logits_of(model, ids)
    except Exception as error:
        raise NotText(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    if found.ndim != 2 or found.shape[0] != len(ids):
        raise NotText(f"logits of shape {tuple(found.shape)} for {len(ids)} tokens")
    if not bool(torch.isfinite(found).all()):
        raise NotText("logits are not finite")
    return found


def is_causal(model: nn.Module, ids: torch.Tensor) -> bool:
    """Whether a later token leaves the earlier predictions as they were."""
    other = ids.clone()
    other[-3:] = (other[-3:] + 7) % 60 + 5
    before, after = runs_on_text(model, ids)[:-3], runs_on_text(model, other)[:-3]
    return bool((before - after).abs().max() <= 1e-9 * before.abs().max())


def padding_changes(model: nn.Module, ids: torch.Tensor) -> float:
    """How much of the largest logit padding on the right changes, in the untouched model itself."""
    alone, padded = runs_on_text(model, ids), runs_on_text(model, torch.cat([ids, torch.zeros_like(ids)]))
    return float((padded[: len(ids)] - alone).abs().max() / alone.abs().max())


def want(
    model: nn.Module, scored: Scored, directions: Mapping[str, Direction], ids: torch.Tensor, labels: torch.Tensor
) -> Wanted:
    """Everything but the causal columns."""
    model.requires_grad_(False)
    parameters = {name: model.get_parameter(name).requires_grad_(True) for name in scored.modules}
    calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    notes = []

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                return output  # of a part that only chooses, such as an indexer
            calls.setdefault(name, []).append((args[0].detach(), output))
            return output.clone()  # the model may write to it

        return hook

    with ExitStack() as hooks:
        for name, module in scored.modules.items():
            if not scored.experts[name]:
                hooks.callback(model.get_submodule(module).register_forward_hook(keep(name)).remove)
        logits = logits_of(model, ids)
    logp = logits.log_softmax(-1)
    at = [t for t in range(1, len(ids)) if int(labels[t]) >= 0]
    losses = {t: -logp[t - 1, int(labels[t])] for t in at}
    total = torch.stack(list(losses.values())).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True)
    by_name = dict(zip(parameters, gradients, strict=True))
    unused = tuple(name for name, gradient in by_name.items() if gradient is None)
    sums = {
        d: float(sum((g * directions[d][n]).sum() for n, g in by_name.items() if g is not None)) for d in directions
    }
    kept = [(name, entering, output) for name, several in calls.items() for entering, output in several]
    errors = torch.autograd.grad(total, [o for _, _, o in kept], retain_graph=True, allow_unused=True)
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    whole = not any(scored.experts.values())
    for (name, entering, output), error in zip(kept, errors, strict=True):
        error = torch.zeros_like(output) if error is None else error
        rows = entering.reshape(-1, entering.shape[-1])
        if len(rows) != len(ids):
            whole = False  # of some positions, or of several for each
            continue
        seen.setdefault(name, []).append((rows, error.reshape(-1, error.shape[-1])))
    single = {name for name, count in scored.experts.items() if not count}
    whole = whole and single <= set(seen) | set(unused)
    columns = {name: torch.zeros(len(ids)) for name in ("loss", "entropy")}
    moved = {d: moved_logits(model, logits, parameters, directions[d], ids, notes) for d in DIRECTIONS}
    for name in ("information", *(f"{d}_exact" for d in DIRECTIONS)):
        columns[name] = torch.zeros(len(ids))
    probability = logp.detach().exp()
    finite = logp.detach().clamp(min=torch.finfo(logp.dtype).min)
    for t in at:
        p = probability[t - 1]
        columns["loss"][t] = losses[t].detach()
        columns["entropy"][t] = -(p * finite[t - 1]).sum()
        u = moved["adaptation"][t - 1]
        columns["information"][t] = (p * u.square()).sum() - (p * u).sum().square()
        for d in DIRECTIONS:
            along = moved[d][t - 1]
            columns[f"{d}_exact"][t] = (p * along).sum() - along[int(labels[t])]
    if whole:
        once = all(len(several) == 1 for several in seen.values())
        at_position = _direct(seen, scored, directions, len(ids))
        if not once:
            notes.append("gradient_norm not compared: maps that are called more than once")
            del at_position["gradient_norm"]
        for name, values in at_position.items():
            columns[name] = torch.zeros(len(ids))
            columns[name][at] = values[[t - 1 for t in at]]
    else:
        notes.append("direct by its sum over positions")
    inputs = {name: several[0][0] for name, several in seen.items() if len(several) == 1}
    outputs = {name: several[0][1] for name, several in seen.items() if len(several) == 1}
    model.requires_grad_(False)
    return Wanted(columns, sums, inputs, outputs, unused, tuple(notes))


def _direct(
    seen: Mapping[str, list[tuple[torch.Tensor, torch.Tensor]]],
    scored: Scored,
    directions: Mapping[str, Direction],
    length: int,
) -> dict[str, torch.Tensor]:
    """d' M h summed over maps and calls, and the gradient norm, at every position."""
    found = {f"{d}_direct": torch.zeros(length) for d in directions}
    squares = torch.zeros(length)
    for name, several in seen.items():
        for entering, error in several:
            squares += entering.square().sum(1) * error.square().sum(1)
            for d in directions:
                matrix = directions[d][name]
                matrix = matrix.T if scored.transposed[name] else matrix
                found[f"{d}_direct"] += torch.einsum("po,oi,pi->p", error, matrix, entering)
    return {**found, "gradient_norm": squares.sqrt()}


def moved_logits(
    model: nn.Module,
    logits: torch.Tensor,
    parameters: Mapping[str, nn.Parameter],
    direction: Direction,
    ids: torch.Tensor,
    notes: list[str],
) -> torch.Tensor:
    """u (T, V): the derivative of the logits along a direction, by a backward pass of a backward pass.

    The gradient of sum(v * logits) is linear in v; its product with the direction, differentiated by v, is u. Where some
    operation has no second derivative: central differences of fourth order.
    """
    try:
        v = torch.zeros_like(logits, requires_grad=True)
        gradients = torch.autograd.grad(logits, list(parameters.values()), v, create_graph=True, allow_unused=True)
        pairs = [(g, direction[n]) for n, g in zip(parameters, gradients, strict=True) if g is not None]
        product = torch.stack([(g * m).sum() for g, m in pairs]).sum()
        return torch.autograd.grad(product, v, retain_graph=True)[0].detach()
    except RuntimeError:
        notes.append("exact and information by finite differences")
    return _difference(model, parameters, direction, ids)


@torch.no_grad()
def _difference(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], direction: Direction, ids: torch.Tensor
) -> torch.Tensor:
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def at(step: float) -> torch.Tensor:
        for name, parameter in parameters.items():
            parameter.copy_(before[name] + step * direction[name])
        return logits_of(model, ids)

    one, two = at(STEP) - at(-STEP), at(2 * STEP) - at(-2 * STEP)
    at(0.0)
    return (8 * one - two) / (12 * STEP)


def causal(
    wanted: Wanted,
    directions: Mapping[str, Direction],
    scored: Scored,
    attention: Mapping[str, torch.Tensor],
    values: Mapping[str, tuple[torch.Tensor, str]],
    window: int,
) -> dict[str, torch.Tensor] | None:
    """e' M_v h at every position, e_p = sum over 0 < k - p <= W of A[k, p] d_k; ``values``: by
    parameter, the projection's rows and the attention module that it feeds.

    None where an attention or its projection was not seen.
    """
    length = len(next(iter(wanted.columns.values())))
    found = {f"{d}_causal": torch.zeros(length) for d in directions}
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    for name, (rows, module) in values.items():
        if module not in attention or name not in wanted.inputs:
            return None
        band = attention[module].masked_fill((distance <= 0) | (distance > window), 0.0)
        reached = band.T @ wanted.errors[name][:, rows]
        for d in directions:
            matrix = directions[d][name]
            matrix = matrix.T if scored.transposed[name] else matrix
            found[f"{d}_causal"] += (reached * (wanted.inputs[name] @ matrix[rows].T)).sum(1)
    return found

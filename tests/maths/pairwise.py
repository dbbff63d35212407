"""The slow oracle: token values by the paper's own definition, every train token paired with every validation token.

Nothing here comes from `alphatoken.pipeline.maths`. One sequence at a time and unpadded, float64, the whole attention matrix, a
backward pass through the whole model with every parameter requiring a gradient, plain hooks, experts one after the
other. What a linear map is, where the value projection's rows are and how experts gate is written down by hand in a
`Layout` per architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

IGNORED = -100
Key = tuple[str, int]  # parameter name, expert (0 where there is a single matrix)


@dataclass(frozen=True)
class Layout:
    """Where the parts of an architecture are; names are relative to a decoder layer."""

    layers: str
    linears: tuple[str, ...]
    value: str
    value_rows: Callable[[Any], list[int]] | None = None
    transposed: bool = False  # linear maps are stored (d_in, d_out), as Conv1D does
    experts: str | None = None
    gate: Callable[[torch.Tensor], torch.Tensor] | None = None
    experts_transposed: bool = False
    experts_bias: bool = False
    routers: tuple[str, ...] = ()  # matrices that are not scored


def silu_gate(inner: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, the gates first."""
    half = inner.shape[-1] // 2
    return F.silu(inner[..., :half]) * inner[..., half:]


def gpt_oss_gate(inner: torch.Tensor) -> torch.Tensor:
    """gpt-oss: gate and up interleaved, clamped at 7; gate * sigmoid(1.702 gate) * (up + 1)."""
    gate, up = inner[..., 0::2].clamp(max=7.0), inner[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


@dataclass(frozen=True)
class Recorded:
    """One sequence of length T: losses by predicting position, h (T, d_in) and d (T, d_out) by matrix, A (T, T).

    ``log_probability`` (T, V): what follows each position.
    """

    losses: dict[int, float]
    log_probability: torch.Tensor
    seen: dict[Key, tuple[torch.Tensor, torch.Tensor]]
    attention: dict[str, torch.Tensor]  # name of the value projection -> probabilities averaged over heads
    gradients: dict[str, torch.Tensor]  # plain autograd's gradient of every parameter

    @property
    def length(self) -> int:
        return next(iter(self.attention.values())).shape[0]


_probabilities: dict[nn.Module, torch.Tensor] = {}


def _full_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    logits = torch.einsum("bhkd,bhpd->bhkp", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(attention_mask < 0, float("-inf"))
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=-1)
    probability = torch.softmax(logits, dim=-1)[..., : key.shape[2]]
    _probabilities[module] = probability.detach()
    return torch.einsum("bhkp,bhpd->bkhd", probability, value), probability


AttentionInterface.register("pairwise", _full_attention)
AttentionMaskInterface.register("pairwise", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def oracle(model: nn.Module) -> nn.Module:
    """A float64 copy of a model with the full attention matrix, every parameter requiring a gradient."""
    twin = copy.deepcopy(model).double().eval().requires_grad_(True)
    twin.set_attn_implementation("pairwise")
    if hasattr(twin.config, "_experts_implementation"):
        twin.set_experts_implementation("eager")
    return twin


def record(twin: nn.Module, layout: Layout, layers: int, ids: Sequence[int], labels: Sequence[int]) -> Recorded:
    """Forward and backward of the SUM of the response tokens' cross-entropies, hooks on the last ``layers`` layers."""
    stack = twin.get_submodule(layout.layers)
    names = [f"{layout.layers}.{i}" for i in range(len(stack) - layers, len(stack))]
    outputs: dict[Key, tuple[torch.Tensor, torch.Tensor]] = {}
    _probabilities.clear()

    def keep(key: Key, entering: torch.Tensor, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs[key] = (entering.detach().reshape(-1, entering.shape[-1]), output)

    with ExitStack() as hooks:
        for name in names:
            for linear in layout.linears:
                full = f"{name}.{linear}"

                def hook(module: nn.Module, args: tuple, output: torch.Tensor, full: str = full) -> None:
                    keep((f"{full}.weight", 0), args[0], output)

                hooks.callback(twin.get_submodule(full).register_forward_hook(hook).remove)
            if layout.experts is not None:
                hooks.enter_context(_looped(twin, layout, f"{name}.{layout.experts}", keep))
        twin.zero_grad()
        logits = twin(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    losses = {
        t - 1: F.cross_entropy(logits[t - 1], torch.tensor(labels[t])) for t in range(1, len(ids)) if labels[t] >= 0
    }
    torch.stack(list(losses.values())).sum().backward()
    seen = {}
    for key, (entering, output) in outputs.items():
        error = output.grad if output.grad is not None else torch.zeros_like(output)
        seen[key] = (entering, error.reshape(-1, error.shape[-1]))
    attention = {}
    for name in names:
        (found,) = (_probabilities[m] for m in twin.get_submodule(name).modules() if m in _probabilities)
        attention[f"{name}.{layout.value}.weight"] = found[0].mean(dim=0)
    gradients = {n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None}
    log_probability = logits.detach().log_softmax(-1)
    return Recorded({p: loss.item() for p, loss in losses.items()}, log_probability, seen, attention, gradients)


def moved_logits(
    twin: nn.Module, layout: Layout, layers: int, ids: Sequence[int], direction: dict[Key, torch.Tensor]
) -> torch.Tensor:
    """The derivative u (T, V) of all logits along a direction in the scored matrices, by a backward pass of a backward pass.

    The gradient of sum(v * logits) is linear in v; its product with the direction, differentiated by v, is u.
    """
    stack = twin.get_submodule(layout.layers)
    with ExitStack() as hooks:
        if layout.experts is not None:
            for i in range(len(stack) - layers, len(stack)):
                name = f"{layout.layers}.{i}.{layout.experts}"
                hooks.enter_context(_looped(twin, layout, name, lambda *_: None))
        logits = twin(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    v = torch.zeros_like(logits, requires_grad=True)
    names = sorted({name for name, _ in direction})
    parameters = [twin.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(logits, parameters, v, create_graph=True, allow_unused=True)
    product = (0 * v).sum()
    for name, gradient in zip(names, gradients, strict=True):
        for key, matrix in direction.items():
            if key[0] == name and gradient is not None:
                product = product + (_of_expert(gradient, layout, key) * matrix).sum()
    return torch.autograd.grad(product, v)[0]


@contextmanager
def _looped(twin: nn.Module, layout: Layout, name: str, keep: Callable) -> Iterator[None]:
    """Every expert on every token; the routing weight is zero where a token did not choose the expert."""
    module: Any = twin.get_submodule(name)

    def product(parameter: str, expert: int, entering: torch.Tensor) -> torch.Tensor:
        matrix = getattr(module, parameter)[expert]
        output = entering @ (matrix if layout.experts_transposed else matrix.T)
        if layout.experts_bias:
            output = output + getattr(module, f"{parameter}_bias")[expert]
        keep((f"{name}.{parameter}", expert), entering, output)
        return output

    def forward(hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert layout.gate is not None
        total = torch.zeros_like(hidden)
        for expert in range(module.down_proj.shape[0]):
            chosen = (weight * (index == expert)).sum(dim=1, keepdim=True)
            leaving = product("down_proj", expert, layout.gate(product("gate_up_proj", expert, hidden)))
            total = total + chosen * leaving
        return total

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def value_rows(layout: Layout, config: Any, width: int) -> list[int]:
    """The rows of the value projection's output that are values."""
    return list(range(width)) if layout.value_rows is None else layout.value_rows(config)


def reaching_errors(attention: torch.Tensor, error: torch.Tensor, window: int) -> torch.Tensor:
    """e_p = sum over k with 0 < k - p <= W of A[k, p] d_k (Eq. 9), one pair after the other; (T, d_v)."""
    length = attention.shape[0]
    reached = torch.zeros_like(error)
    for p in range(length):
        for k in range(p + 1, min(length, p + window + 1)):
            reached[p] += attention[k, p] * error[k]
    return reached


def fisher(completions: Sequence[Recorded]) -> dict[Key, torch.Tensor]:
    """F = mean over prompts of the sum over positions of d_i^2 h_j^2 (Eq. 5), (d_out, d_in) by matrix."""
    total: dict[Key, torch.Tensor] = {}
    for recorded in completions:
        for key, (entering, error) in recorded.seen.items():
            matrix = total.setdefault(key, torch.zeros(error.shape[1], entering.shape[1], dtype=torch.float64))
            for p in range(recorded.length):
                matrix += torch.outer(error[p] ** 2, entering[p] ** 2) / len(completions)
    return total


def weight_of(twin: nn.Module, layout: Layout, key: Key) -> torch.Tensor:
    """The matrix itself as (d_out, d_in)."""
    return _of_expert(twin.get_parameter(key[0]).detach(), layout, key)


def _of_expert(stored: torch.Tensor, layout: Layout, key: Key) -> torch.Tensor:
    """One matrix (d_out, d_in) of a parameter, or of something of its shape."""
    if stored.ndim == 3:
        return stored[key[1]].T if layout.experts_transposed else stored[key[1]]
    return stored.T if layout.transposed else stored


def adaptation(validation: Sequence[Recorded]) -> dict[Key, torch.Tensor]:
    """G = mean over validation positions of d h^T, by matrix, one position after the other."""
    pairs = [(one, v) for one in validation for v in one.losses]
    total: dict[Key, torch.Tensor] = {}
    for one, v in pairs:
        for key, (entering, error) in one.seen.items():
            matrix = total.setdefault(key, torch.zeros(error.shape[1], entering.shape[1], dtype=torch.float64))
            matrix += torch.outer(error[v], entering[v]) / len(pairs)
    return total


def fisher_drift(
    policy: nn.Module, reference: nn.Module, layout: Layout, completions: Sequence[Recorded]
) -> dict[Key, torch.Tensor]:
    """V = F * (W - W_ref) (Eq. 10), by matrix."""
    found = fisher(completions)
    return {k: f * (weight_of(policy, layout, k) - weight_of(reference, layout, k)) for k, f in found.items()}


def position_values(
    config: Any,
    layout: Layout,
    train: Recorded,
    validation: Sequence[Recorded],
    drift: dict[Key, torch.Tensor],
    window: int,
) -> dict[str, torch.Tensor]:
    """The four components of every network position p of one sequence, (T,) each (Eqs. 8, 9 and 11)."""
    names = ("adaptation_direct", "adaptation_causal", "stability_direct", "stability_causal")
    out = {name: torch.zeros(train.length, dtype=torch.float64) for name in names}
    pairs = [(one, v) for one in validation for v in one.losses]
    for key, (entering, error) in train.seen.items():
        causal = key[0] in train.attention
        if causal:
            rows = value_rows(layout, config, error.shape[1])
            reached = reaching_errors(train.attention[key[0]], error[:, rows], window)
        for p in range(train.length):
            for one, v in pairs:
                other_entering, other_error = one.seen[key]
                alike = torch.dot(entering[p], other_entering[v])
                out["adaptation_direct"][p] += torch.dot(error[p], other_error[v]) * alike / len(pairs)
                if causal:
                    out["adaptation_causal"][p] += torch.dot(reached[p], other_error[v, rows]) * alike / len(pairs)
            out["stability_direct"][p] += (error[p][:, None] * drift[key] * entering[p][None]).sum()
            if causal:
                out["stability_causal"][p] += (reached[p][:, None] * drift[key][rows] * entering[p][None]).sum()
    return out


def prediction_values(one: Recorded, moved: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is said of the prediction at every position, (T,) each: information u'F u, entropy, gradient norm.

    ``moved`` u (T, V): of ``moved_logits``. F = diag(p) - p p', written down as a matrix.
    """
    names = ("information", "entropy", "gradient_norm")
    out = {name: torch.zeros(one.length, dtype=torch.float64) for name in names}
    for p in range(one.length):
        probability = one.log_probability[p].exp()
        fisher_matrix = torch.diag(probability) - torch.outer(probability, probability)
        out["information"][p] = moved[p] @ fisher_matrix @ moved[p]
        out["entropy"][p] = -(probability * one.log_probability[p]).sum()
        squares = sum(float(d[p] @ d[p]) * float(h[p] @ h[p]) for h, d in one.seen.values())
        out["gradient_norm"][p] = squares**0.5
    return out


def token_values(positions: dict[str, torch.Tensor], train: Recorded) -> dict[str, torch.Tensor]:
    """Values of predicting positions p at the token p + 1 that they predict, zero elsewhere; with the loss column."""
    out = {}
    for name, values in positions.items():
        out[name] = torch.zeros_like(values)
        for p in train.losses:
            out[name][p + 1] = values[p]
    out["loss"] = torch.zeros(train.length, dtype=torch.float64)
    for p, loss in train.losses.items():
        out["loss"][p + 1] = loss
    return out

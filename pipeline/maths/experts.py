"""Mixture-of-experts layers: stacked expert matrices, applied one expert at a time so that each can be tapped.

Registered with transformers' experts interface. Layers that are not scored go on through the implementation that the
model had.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from alphatoken.pipeline.maths.linear_maps import is_stacked_experts

NAME = "alphatoken"

# (module, parameter name, expert, input (n, d_in), output (n, d_out), token rows (n,)) -> the output to go on with
Tap = Callable[[nn.Module, str, int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_active = threading.local()


@contextmanager
def tapped_experts(model: Any, scored: set[nn.Module], tap: Tap) -> Iterator[None]:
    """Call ``tap`` after every matrix product of an expert in the modules ``scored``, for one block of code."""
    configs = {id(m.config): m.config for m in model.modules() if is_stacked_experts(m)}
    before = {key: config._experts_implementation for key, config in configs.items()}
    _active.state = (scored, tap, before)
    for config in configs.values():
        config._experts_implementation = NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        _active.state = None


def _experts(module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The registered function: hidden (tokens, d), index and weight (tokens, top_k) -> (tokens, d)."""
    scored, tap, before = _active.state
    if module not in scored:
        original = type(module).forward.__wrapped__
        return ALL_EXPERTS_FUNCTIONS.get_interface(before[id(module.config)], original)(module, hidden, index, weight)
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    output = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        if expert >= module.num_experts:
            continue  # expert parallelism marks the experts of other ranks so
        rows, slot = torch.where(index == expert)
        entering = hidden[rows]
        inner = tap(module, up_name, expert, entering, _product(module, up_name, expert, entering), rows)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        leaving = tap(module, "down_proj", expert, inner, _product(module, "down_proj", expert, inner), rows)
        if getattr(module, "has_post_expert_norm", False):
            leaving = module.post_expert_norm(leaving)
        output = output.index_add(0, rows, (leaving * weight[rows, slot, None]).to(output.dtype))
    return output


def _product(module: Any, name: str, expert: int, entering: torch.Tensor) -> torch.Tensor:
    matrix = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return F.linear(entering, matrix.T if module.is_transposed else matrix, bias)


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)

"""Attention probabilities of the untouched model in eager attention.

Attention is linear in its value, so the model's own eager function, handed the identity in the value's place, returns the
matrix that it multiplies values with, sinks, caps and biases included. Where a model has no such function, what its
attention modules return as probabilities is taken.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.models.oracle import Scored, logits_of, runs_on_text

_NAME = "eager_attention_forward"


def attention_of(model: Any, scored: Scored, ids: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """Attention module of a scored layer -> (T, T) averaged over heads.

    None where eager attention is not there or predicts something else.
    """
    twin = copy.deepcopy(model)
    plain = runs_on_text(model, ids)
    of_function: dict[str, list[torch.Tensor]] = {}
    of_module: dict[str, list[torch.Tensor]] = {}
    names = {m: n for layer in scored.layers for n, m in twin.get_submodule(layer).named_modules(prefix=layer)}

    def read(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            for one in output if isinstance(output, tuple) else ():
                if isinstance(one, torch.Tensor) and one.ndim == 4 and one.shape[2] == len(ids) <= one.shape[3]:
                    of_module.setdefault(name, []).append(one.detach()[0, :, :, : len(ids)].mean(0))
                    return

        return hook

    def see(module: nn.Module, matrix: torch.Tensor) -> None:
        if module in names:
            of_function.setdefault(names[module], []).append(matrix[:, : len(ids)])

    try:
        twin.set_attn_implementation("eager")
        for module, name in names.items():
            module.register_forward_hook(read(name))
        with torch.no_grad(), _shown(list(names), see):
            other = logits_of(twin, ids)
    except Exception:
        return None
    if (other - plain).abs().max() > 1e-9 * plain.abs().max():
        return None
    once = {name: several[0] for name, several in of_module.items() if len(several) == 1}
    return once | {name: several[0] for name, several in of_function.items() if len(several) == 1}


@contextmanager
def _shown(modules: list[nn.Module], see: Callable[[nn.Module, torch.Tensor], None]) -> Iterator[None]:
    """Every call of an eager attention function in the files of ``modules``, shown as a matrix (T, keys)."""
    files = {sys.modules[type(module).__module__] for module in modules}
    own = {file: getattr(file, _NAME) for file in files if hasattr(file, _NAME)}

    def showing(function: Callable) -> Callable:
        def forward(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            identity = torch.eye(value.shape[2]).expand(*value.shape[:3], -1)
            see(module, function(module, query, key, identity, *args, **kwargs)[0][0].mean(1))
            return function(module, query, key, value, *args, **kwargs)

        return forward

    for file, function in own.items():
        setattr(file, _NAME, showing(function))
    try:
        yield
    finally:
        for file, function in own.items():
            setattr(file, _NAME, function)

"""Linear maps, found by what modules do and not by their names.

A *linear map* is a matrix parameter that is applied to every position: `nn.Linear` (also behind a fused
query-key-value projection) and its subclasses that compute the same, transformers' `Conv1D`, and the stacked matrices of
mixture-of-experts layers that go through transformers' experts interface.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class LinearMap:
    """One scored matrix (or stack of matrices, one per expert).

    ``name`` is the parameter's name in the model. ``transposed``: the parameter is stored ``(d_in, d_out)``.
    ``experts``: 0, or the number of stacked matrices.
    """

    name: str
    layer: int
    module: nn.Module = field(repr=False, compare=False)
    transposed: bool = False
    experts: int = 0

    @property
    def parameter(self) -> nn.Parameter:
        """The weight itself, in the shape in which the model stores it."""
        return getattr(self.module, self.name.rpartition(".")[2])

    @torch.no_grad()
    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """W h without a bias, (..., d_in) -> (..., d_out), of a map that is a single matrix."""
        return rows @ (self.parameter if self.transposed else self.parameter.mT)


def linear_maps_of(path: str, module: Any, layer: int) -> list[LinearMap]:
    """The linear maps whose matrices are parameters of ``module`` itself; ``path``: its name in the model."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear | Conv1D):
        if not _is_float(weight) or weight.ndim != 2:
            return []  # quantised: its stored shape is not that of a matrix; counted as left out
        kind: Any = type(module)
        if not _is_linear(kind):
            return []  # a subclass that does something else with its weight, such as a router; counted as left out
        return [LinearMap(f"{path}.weight", layer, module, transposed=isinstance(module, Conv1D))]
    if is_stacked_experts(module):
        names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
        return [
            LinearMap(f"{path}.{name}", layer, module, module.is_transposed, getattr(module, name).shape[0])
            for name in names
        ]
    return []


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as stacked parameters that go through transformers' experts interface."""
    names = ("has_gate", "is_transposed", "has_bias", "_apply_gate", "down_proj")
    if not all(hasattr(module, name) for name in names):
        return False
    return _is_float(module.down_proj) and module.down_proj.ndim == 3


@cache
def _is_linear(kind: type[nn.Module]) -> bool:
    """Whether a class computes W x + b, tried on a small instance of it."""
    if kind in (nn.Linear, Conv1D):
        return True
    if not issubclass(kind, nn.Linear):
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 5, 3, generator=generator)
    for bias in (True, False):
        probe = nn.Linear(3, 4, bias=bias).eval()
        expected = F.linear(rows, probe.weight, probe.bias)
        probe.__class__ = kind  # without its __init__, whose arguments are not known
        try:
            with torch.no_grad():
                found = probe(rows)
        except Exception:  # whatever it needs beside a weight and a bias, it is more than a linear map
            return False
        if not isinstance(found, torch.Tensor) or found.shape != expected.shape or not torch.allclose(found, expected):
            return False
    return True


def _is_float(weight: object) -> TypeGuard[torch.Tensor]:
    """Whether a weight is stored in a dtype that is computed in; an 8-bit float is a code with a scale elsewhere."""
    return isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1

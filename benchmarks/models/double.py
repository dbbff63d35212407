"""Double precision throughout: models raise to float32 in norms, routers and rotary angles, and are asked not to.

A rounding of 1e-7 in the middle of a float64 model would hide an error of the same size. Under this mode whatever asks for
float32 gets float64; the model itself stays as it is, for the engine and for the oracle alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Double(TorchFunctionMode):
    """Inside the block, float32 is read as float64 in every call of torch."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The call with its dtypes replaced."""
        kwargs = {name: _wider(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_wider, args), **kwargs)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value

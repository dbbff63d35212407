"""Derivatives of a forward pass along a direction in the scored weights, carried beside the values (forward mode).

    y = W h      =>      y' = W h' + M h        at every scored linear map, M the direction

A hidden state and its derivative travel as a dual number of `torch.autograd.forward_ad`; norms, activations and residual
sums derive themselves. The product M h is added here, so that weights stay what they are, and attention derives itself
block by block (attention.py). What leaves the last layer is the derivative of the last hidden state.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
import torch.autograd.forward_ad as forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.directions import rounded, scale_for
from alphatoken.pipeline.maths.linear_maps import LinearMap

_LEVEL = threading.Lock()
_ENABLED = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}
_KERNELS: list[SDPBackend] = []  # that were enabled before the dual level that is entered


@contextmanager
def dual_level() -> Iterator[None]:
    """Dual numbers inside the block. torch has one level for all threads, so that one thread at a time is inside.

    Fused attention kernels have no derivative in forward mode: models that call them past attention.py get the plain one.
    """
    with _LEVEL:
        _KERNELS[:] = [kernel for kernel, enabled in _ENABLED.items() if enabled()]
        try:
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                yield
        finally:
            _KERNELS.clear()


@contextmanager
def usual_kernels() -> Iterator[None]:
    """Inside the block, attention may take the kernels that it could before a dual level: for values alone."""
    with sdpa_kernel(list(_KERNELS)) if _KERNELS else nullcontext():
        yield


class Tangents:
    """One direction M, in the model's device and dtype: parameter name -> tensor of the weight's shape.

    All derivatives along it are ``scale`` times what they are, see directions.scale_for.
    """

    def __init__(self, scored: ScoredLayers, direction: Mapping[str, torch.Tensor]) -> None:
        self.scale = scale_for(scored.maps[0].parameter.dtype, (direction[m.name] for m in scored.maps))
        self.matrices = {m.name: rounded(direction[m.name], m.parameter, self.scale) for m in scored.maps}

    @property
    def still(self) -> bool:
        """Whether the direction is zero everywhere, as stability is without a drift: nothing moves along it."""
        return not any(bool(matrix.any()) for matrix in self.matrices.values())

    @torch.no_grad()
    def product(self, linear: LinearMap, expert: int, entering: torch.Tensor) -> torch.Tensor:
        """M h (..., d_out) for the input h (..., d_in) of a scored map, of a dual number for its value."""
        matrix = self.matrices[linear.name]
        matrix = matrix[expert] if linear.experts else matrix
        return entering.detach() @ (matrix if linear.transposed else matrix.mT)


def with_tangent(value: torch.Tensor, moved: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """``value`` as a dual number with the derivative M h + W h', of which ``before`` is the second part (None: zero).

    Call it inside a dual level. ``moved`` is written to. The derivative is no part of the graph for a backward pass.
    """
    return forward_ad.make_dual(value, moved if before is None else moved.add_(before))


def without_tangent(tensor: torch.Tensor) -> torch.Tensor:
    """The value of a dual number, with its graph."""
    return forward_ad.unpack_dual(tensor).primal


def tangent_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The derivative of a dual number, without a graph; None where there is none."""
    tangent = forward_ad.unpack_dual(tensor).tangent
    return None if tangent is None else tangent.detach()

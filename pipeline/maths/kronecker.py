"""Kronecker factors of the curvature, and directions preconditioned with them or with the diagonal.

A training step moves along -P^-1 g and not along -g. Since <P^-1 g, M> = <g, P^-1 M>, it suffices to precondition each
direction once: a direction stays one matrix per linear map and a token's value costs nothing more.

    kfac   vec(M) -> (B (x) A + c)^-1 vec(M),   A = E[h h^T], B = E[d d^T] over positions whose label is sampled from
           the model (Martens and Grosse 2015; Grosse et al. 2023, arXiv 2308.03296)
    adam   M -> M / (sqrt(F) + c),   F = E[d^2 (h^2)^T], the diagonal that AdamW estimates

The damping c is relative: a fraction of the mean eigenvalue of B (x) A, or of the mean of sqrt(F).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from alphatoken.pipeline.maths.capture import Captured
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.linear_maps import LinearMap


class KroneckerFactors:
    """A visitor that sums h h^T, d d^T and positions of every scored linear map (and expert), in float32.

    ``positions``: flat positions of the batch that enter the sums, set before each pass. ``total``: ``A/<name>``
    (d_in, d_in), ``B/<name>`` (d_out, d_out) and ``n/<name>`` (), each with the experts in front where there are any.
    """

    def __init__(self, scored: ScoredLayers) -> None:
        self.positions: torch.Tensor | None = None
        self.total: dict[str, torch.Tensor] = {}
        for linear in scored.maps:
            weight = linear.parameter
            d_out, d_in = _matrix(weight.detach(), linear).shape[-2:]
            experts = weight.shape[:1] if linear.experts else ()
            dtype = torch.promote_types(weight.dtype, torch.float32)
            for key, size in (("A", (d_in, d_in)), ("B", (d_out, d_out)), ("n", ())):
                self.total[f"{key}/{linear.name}"] = weight.new_zeros((*experts, *size), dtype=dtype)

    def __call__(self, captured: Captured) -> None:
        """Add one linear map's positions."""
        entering, error, rows = captured.entering, captured.error, captured.rows
        if self.positions is not None:
            chosen = self.positions if rows is None else torch.isin(rows, self.positions).nonzero().squeeze(1)
            entering, error = entering[chosen], error[chosen]
        a, b, n = (self.total[f"{key}/{captured.map.name}"] for key in "ABn")
        if captured.map.experts:
            a, b, n = a[captured.expert], b[captured.expert], n[captured.expert]
        entering, error = entering.to(a.dtype), error.to(b.dtype)
        a.addmm_(entering.T, entering)
        b.addmm_(error.T, error)
        n.add_(len(entering))


def kfac(
    direction: torch.Tensor, factors: Mapping[str, torch.Tensor], linear: LinearMap, damping: float
) -> torch.Tensor:
    """(B (x) A + c)^-1 applied to one direction, in its own shape; float32, computed in float64.

    ``factors``: the sums of ``KroneckerFactors``. c = ``damping`` times the mean eigenvalue of B (x) A (over all
    experts), which is trace(A) trace(B) / (d_in d_out).
    """
    matrix = _matrix(direction.double(), linear)
    a, b, n = (factors[f"{key}/{linear.name}"].to(direction.device, torch.float64) for key in "ABn")
    if not linear.experts:
        matrix, a, b, n = matrix[None], a[None], b[None], n[None]
    count = n.clamp(min=1)[:, None, None]
    values_a, vectors_a = torch.linalg.eigh(a / count)
    values_b, vectors_b = torch.linalg.eigh(b / count)
    curvature = values_b.clamp(min=0)[:, :, None] * values_a.clamp(min=0)[:, None, :]  # (experts, d_out, d_in)
    damped = curvature + damping * curvature.mean()
    moved = vectors_b @ _quotient(vectors_b.mT @ matrix @ vectors_a, damped) @ vectors_a.mT
    moved = moved if linear.experts else moved[0]
    return _matrix(moved, linear).float().contiguous()


def adam(direction: torch.Tensor, fisher: torch.Tensor, damping: float) -> torch.Tensor:
    """M / (sqrt(F) + c), elementwise in float32; c = ``damping`` times the mean of sqrt(F)."""
    root = fisher.float().sqrt()
    return _quotient(direction.float(), root + damping * root.mean())


def _quotient(direction: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """Elementwise; 0 where the direction is 0: a weight that does not enter the loss has neither slope nor curvature."""
    return torch.where(direction == 0, 0.0, direction / curvature)


def _matrix(tensor: torch.Tensor, linear: LinearMap) -> torch.Tensor:
    """(..., d_out, d_in) from the shape in which the model stores the weight, and back."""
    return tensor.mT if linear.transposed else tensor

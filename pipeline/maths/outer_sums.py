"""Sums of outer products over positions: the gradient of the scored weights, and their diagonal Fisher.

gradient  G_l = sum over positions of  d_p h_p^T            Fisher  F_l = sum over positions of  (d_p^2) (h_p^2)^T
"""

from __future__ import annotations

import torch

from alphatoken.pipeline.maths.capture import Captured
from alphatoken.pipeline.maths.decoder import ScoredLayers


class OuterSum:
    """A visitor that sums outer products in float32 (float64 for a float64 model), one tensor per scored weight.

    ``squared``: of the squares of error and input (the Fisher) instead of themselves (the gradient). ``positions``:
    flat positions of the batch that enter the sum, set before each pass; None: all of them. ``rounded``: the products of one
    pass are made in the model's own dtype, as a training step makes them, which takes half the time where that has 16 bits.
    """

    def __init__(self, scored: ScoredLayers, squared: bool = False, rounded: bool = False) -> None:
        self.squared, self.rounded = squared, rounded
        self.positions: torch.Tensor | None = None
        self.total: dict[str, torch.Tensor] = {}
        for name, weight in scored.weights().items():
            self.total[name] = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))

    def __call__(self, captured: Captured) -> None:
        """Add one linear map's outer products."""
        entering, error, rows = captured.entering, captured.error, captured.rows
        if self.positions is not None:
            chosen = self.positions if rows is None else torch.isin(rows, self.positions).nonzero().squeeze(1)
            entering, error = entering[chosen], error[chosen]
        total = self.total[captured.map.name]
        if captured.map.experts:
            total = total[captured.expert]
        if self.rounded and error.dtype != total.dtype:
            left, right = (entering, error) if captured.map.transposed else (error, entering)
            total.add_(left.T @ right)
            return
        entering, error = entering.to(total.dtype), error.to(total.dtype)
        if self.squared:
            entering, error = entering.square(), error.square()
        left, right = (entering, error) if captured.map.transposed else (error, entering)
        total.addmm_(left.T, right)

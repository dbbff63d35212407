"""`gradient_norm`: the Frobenius norm over the scored maps of what the token's position adds to the gradient.

    sqrt(sum over l in S of |d_p|^2 |h_p|^2)

What a position adds to the gradient of one map, d_p h_p^T, has rank one, so that its norm comes free with the pass. By
position, as `adaptation_direct`: without the errors e_p that come through attention.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from alphatoken.pipeline.maths.capture import Captured
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.positions import Positions


class GradientNorm:
    """See LayerScore."""

    columns: tuple[str, ...] = ("gradient_norm",)
    directed: ClassVar[bool] = False

    def __init__(
        self, scored: ScoredLayers, directions: Directions | None, window: int, attention: str, given: str | None
    ) -> None:
        """Nothing is needed."""

    def visitor(self, positions: torch.Tensor, shape: tuple[int, int]) -> SquaredNorms:
        """See LayerScore."""
        return SquaredNorms(Positions(positions, shape))


class SquaredNorms:
    """Adds up |d|^2 |h|^2, in float64: the square of a small float32 norm is none."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self.squares = torch.zeros(len(positions), dtype=torch.float64, device=positions.device)

    def __call__(self, captured: Captured) -> None:
        """One scored linear map."""
        rows, target = self.positions.of(captured)
        product = _norm(captured.error[rows]) * _norm(captured.entering[rows])
        self.positions.add(self.squares[None], target, product.square()[None])

    def found(self) -> torch.Tensor:
        """(1, positions)."""
        return self.squares.sqrt()[None]


def _norm(rows: torch.Tensor) -> torch.Tensor:
    """(n, d) -> (n,) float64, summed in at least float32."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32)).double()

"""Contract captured (h, d) with the directions: the Ghost Dot-Product per token (Eqs. 8 and 9).

    direct[p] += d_p^T M h_p          causal[p] += e_p^T M_v h_p,   e_p = sum over 0 < k - p <= W of A[k, p] d_k

All directions go through one GEMM per linear map, from the side on which the elementwise product that follows is
smaller; only positions that are asked for are contracted, in chunks of a bounded workspace. What a position adds to the
gradient of one map, d_p h_p^T, has rank one, so that its norm |d_p| |h_p| comes free with the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from alphatoken.pipeline.maths.attention import apply_band
from alphatoken.pipeline.maths.capture import Captured
from alphatoken.pipeline.maths.decoder import LinearMap, ScoredLayers
from alphatoken.pipeline.maths.value_projection import ValueProjection

WORKSPACE_ELEMENTS = 1 << 24


class StackedDirections:
    """All named directions side by side, one matrix per linear map (and expert), on the model's device and dtype."""

    def __init__(self, scored: ScoredLayers, named: Mapping[str, Mapping[str, torch.Tensor]], values: set[str]) -> None:
        self.names = tuple(named)
        self.by_output: dict[str, bool] = {}
        self.matrices: dict[str, torch.Tensor] = {}
        for linear in scored.maps:
            weight = linear.parameter
            parts = [named[name][linear.name].to(weight.device, weight.dtype) for name in self.names]
            parts = [p.mT if linear.transposed else p for p in parts]  # (..., d_out, d_in)
            d_out, d_in = parts[0].shape[-2:]
            by_output = linear.name in values or d_out <= d_in
            self.by_output[linear.name] = by_output
            self.matrices[linear.name] = torch.cat(parts, dim=-2 if by_output else -1).contiguous()

    def of(self, linear: LinearMap, expert: int) -> tuple[torch.Tensor, bool]:
        """(matrix, by_output): (S * d_out, d_in) to multiply h with, or (d_out, S * d_in) to multiply d with."""
        matrix = self.matrices[linear.name]
        return (matrix[expert] if linear.experts else matrix), self.by_output[linear.name]


class Contraction:
    """A visitor that adds up each position's components over all scored linear maps.

    ``positions``: flat positions (over batch * length) to contract. After the pass ``direct`` and ``causal`` hold
    (directions, positions) in at least float32. With ``norms``, ``squares`` (positions,) float64 holds
    sum over linear maps of |d_p|^2 |h_p|^2, without the errors e_p that come through attention: the squared Frobenius
    norm of the gradient whose products with the directions are ``direct``.
    """

    def __init__(
        self,
        directions: StackedDirections,
        values: Mapping[str, ValueProjection],
        positions: torch.Tensor,
        shape: tuple[int, int],
        norms: bool = False,
    ) -> None:
        self.directions, self.values, self.positions = directions, values, positions
        first = next(iter(directions.matrices.values()))
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        size = (len(directions.names), len(positions))
        self.direct = torch.zeros(size, dtype=self.dtype, device=first.device)
        self.causal = torch.zeros(size, dtype=self.dtype, device=first.device)
        self.squares = torch.zeros(len(positions), dtype=torch.float64, device=first.device) if norms else None
        self.index = torch.full((shape[0] * shape[1],), -1, dtype=torch.int64, device=first.device)
        self.index[positions] = torch.arange(len(positions), device=first.device)

    def __call__(self, captured: Captured) -> None:
        """Add one linear map's contribution."""
        if captured.rows is None:
            rows, target = self.positions, None
        else:  # an expert sees some of the positions
            target = self.index[captured.rows]
            rows = (target >= 0).nonzero().squeeze(1)
            target = target[rows]
        reached = self._reached(captured)
        matrix, by_output = self.directions.of(captured.map, captured.expert)
        step = max(1, WORKSPACE_ELEMENTS // matrix.shape[0 if by_output else 1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            into = slice(start, start + len(part)) if target is None else target[start : start + len(part)]
            entering, error = captured.entering[part], captured.error[part]
            if self.squares is not None:
                self.squares[into] += (self._norm(error) * self._norm(entering)).square()
            if by_output:
                moved = (entering @ matrix.T).unflatten(1, (len(self.directions.names), -1))
                self.direct[:, into] += self._inner(moved, error)
            else:
                moved = (error @ matrix).unflatten(1, (len(self.directions.names), -1))
                self.direct[:, into] += self._inner(moved, entering)
            if reached is not None:
                value = self.values[captured.map.name]
                self.causal[:, into] += self._inner(value.of(moved), reached[part])

    def _reached(self, captured: Captured) -> torch.Tensor | None:
        value = self.values.get(captured.map.name)
        if value is None or captured.band is None:
            return None
        error = value.of(captured.error).unflatten(0, captured.shape)
        return apply_band(captured.band, error).flatten(0, 1)

    def _norm(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, d) -> (n,) float64, since the square of a small float32 norm is none."""
        return torch.linalg.vector_norm(rows, dim=1, dtype=self.dtype).double()

    def _inner(self, moved: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """(n, S, d), (n, d) -> inner products (S, n), summed in at least float32."""
        return (moved.to(self.dtype) * other.to(self.dtype)[:, None]).sum(dim=2).T

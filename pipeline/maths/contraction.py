"""Contract captured (h, d) with the directions: the Ghost Dot-Product per token (Eqs. 8 and 9).

    direct[p] += d_p^T M h_p          causal[p] += e_p^T M_v h_p,   e_p = sum over 0 < k - p <= W of A[k, p] d_k

All directions go through one GEMM per linear map, from the side on which the elementwise product that follows is
smaller; only positions that are asked for are contracted, in chunks of a bounded workspace.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from alphatoken.pipeline.maths.attention_blocks import apply_band
from alphatoken.pipeline.maths.capture import Captured
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.directions import rounded, scale_for
from alphatoken.pipeline.maths.linear_maps import LinearMap
from alphatoken.pipeline.maths.positions import Positions
from alphatoken.pipeline.maths.value_projection import ValueProjection

WORKSPACE_ELEMENTS = 1 << 24


class StackedDirections:
    """Named directions side by side, one matrix per linear map (and expert), on the model's device and dtype.

    ``given``: the one of them whose products M h come with what is captured; it is in the stacks of experts alone, of which
    they do not. ``scales``: what each is multiplied by, see directions.scale_for; those products are as well.
    """

    def __init__(
        self,
        scored: ScoredLayers,
        named: Mapping[str, Mapping[str, torch.Tensor]],
        values: set[str],
        given: str | None = None,
    ) -> None:
        self.names, self.dtype = tuple(named), scored.maps[0].parameter.dtype
        self.given = None if given is None else self.names.index(given)
        self.scales = [scale_for(self.dtype, (named[name][m.name] for m in scored.maps)) for name in self.names]
        self.by_output: dict[str, bool] = {}
        self.matrices: dict[str, torch.Tensor] = {}
        for linear in scored.maps:
            weight = linear.parameter
            parts = [
                rounded(named[self.names[line]][linear.name], weight, self.scales[line]) for line in self.lines(linear)
            ]
            if not parts:
                continue
            parts = [p.mT if linear.transposed else p for p in parts]  # (..., d_out, d_in)
            d_out, d_in = parts[0].shape[-2:]
            by_output = linear.name in values or d_out <= d_in
            self.by_output[linear.name] = by_output
            self.matrices[linear.name] = torch.cat(parts, dim=-2 if by_output else -1).contiguous()

    def lines(self, linear: LinearMap) -> list[int]:
        """The numbers of the directions that are stacked for a map."""
        return [line for line in range(len(self.names)) if line != self.given or linear.experts]

    def of(self, linear: LinearMap, expert: int) -> tuple[torch.Tensor, bool]:
        """(matrix, by_output): (S * d_out, d_in) to multiply h with, or (d_out, S * d_in) to multiply d with."""
        matrix = self.matrices[linear.name]
        return (matrix[expert] if linear.experts else matrix), self.by_output[linear.name]


class Contraction:
    """A visitor that adds up each position's components over all scored linear maps.

    After the pass ``direct`` and ``causal`` hold (directions, positions) in at least float32.
    """

    def __init__(
        self, directions: StackedDirections, values: Mapping[str, ValueProjection], positions: Positions
    ) -> None:
        self.directions, self.values, self.positions = directions, values, positions
        self.dtype = torch.promote_types(directions.dtype, torch.float32)
        size = (len(directions.names), len(positions))
        self.direct = torch.zeros(size, dtype=self.dtype, device=positions.device)
        self.causal = torch.zeros(size, dtype=self.dtype, device=positions.device)

    def found(self) -> torch.Tensor:
        """(2 * directions, positions): direct and causal of each direction in turn."""
        scales = self.direct.new_tensor(self.directions.scales)[:, None, None]
        return (torch.stack([self.direct, self.causal], dim=1) / scales).flatten(0, 1)

    def __call__(self, captured: Captured) -> None:
        """Add one linear map's contribution."""
        rows, target = self.positions.of(captured)
        reached, lines = self._reached(captured), self.directions.lines(captured.map)
        if len(lines) < len(self.directions.names):
            assert captured.moved is not None and self.directions.given is not None
            self._add([self.directions.given], captured, captured.moved[:, None], captured.error[rows], reached, rows)
        if not lines:
            return
        matrix, by_output = self.directions.of(captured.map, captured.expert)
        step = max(1, WORKSPACE_ELEMENTS // matrix.shape[0 if by_output else 1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            entering, error = captured.entering[part], captured.error[part]
            first, second = (entering, error) if by_output else (error, entering)
            moved = (first @ (matrix.T if by_output else matrix)).unflatten(1, (len(lines), -1))
            self._add(lines, captured, moved, second, reached, part, target, start)

    def _add(
        self,
        lines: list[int],
        captured: Captured,
        moved: torch.Tensor,
        other: torch.Tensor,
        reached: torch.Tensor | None,
        rows: torch.Tensor,
        target: torch.Tensor | None = None,
        start: int = 0,
    ) -> None:
        """``moved`` (n, S, d) with ``other`` (n, d), and its value's part with what ``rows`` reach through attention."""
        self.positions.add(self.direct, target, self._inner(moved, other), lines, start)
        if reached is not None:
            value = self.values[captured.map.name]
            self.positions.add(self.causal, target, self._inner(value.of(moved), reached[rows]), lines, start)

    def _reached(self, captured: Captured) -> torch.Tensor | None:
        value = self.values.get(captured.map.name)
        band = None if value is None else captured.bands.get(value.attention)
        if value is None or band is None:
            return None
        error = value.of(captured.error).unflatten(0, captured.shape)
        return apply_band(band, error).flatten(0, 1)

    def _inner(self, moved: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """(n, S, d), (n, d) -> inner products (S, n), summed in at least float32."""
        return (moved.to(self.dtype) * other.to(self.dtype)[:, None]).sum(dim=2).T

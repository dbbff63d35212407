"""The paper's columns: the Ghost Dot-Product along the directions, by a direct and a causal path (Eqs. 8, 9, 11).

Adaptation and stability first, then those of further objectives, which cost a contraction each.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from alphatoken.pipeline.maths.contraction import Contraction, StackedDirections
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.directions import NAMES, Directions
from alphatoken.pipeline.maths.positions import Positions
from alphatoken.pipeline.maths.value_projection import value_projections


class Paper:
    """See LayerScore. ``window`` W = 0 leaves the causal path out: its columns are 0."""

    directed: ClassVar[bool] = True

    def __init__(
        self, scored: ScoredLayers, directions: Directions | None, window: int, attention: str, given: str | None
    ) -> None:
        assert directions is not None
        self.values = value_projections(scored, attention) if window > 0 else {}
        others = {name: one for name, one in directions.named.items() if name not in NAMES}
        named = {**{name: directions.named[name] for name in NAMES}, **others}
        self.columns = tuple(f"{name}_{path}" for name in named for path in ("direct", "causal"))
        self.directions = StackedDirections(scored, named, set(self.values), given)

    def visitor(self, positions: torch.Tensor, shape: tuple[int, int]) -> Contraction:
        """See LayerScore."""
        return Contraction(self.directions, self.values, Positions(positions, shape))

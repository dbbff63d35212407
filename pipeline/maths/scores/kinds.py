"""The two kinds of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from alphatoken.pipeline.maths.capture import Captured
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.head import Reading


@dataclass(frozen=True, slots=True)
class HeadScore:
    """Columns that are read off the softmax: name -> reading. ``along``: directions whose derivative they look at."""

    readings: Mapping[str, Reading]
    along: tuple[str, ...] = ()


class LayerVisitor(Protocol):
    """Adds up one pass over one batch; called once per scored linear map (and expert)."""

    def __call__(self, captured: Captured) -> None: ...

    def found(self) -> torch.Tensor:
        """(columns, positions), in at least float32."""


class LayerScore(Protocol):
    """Columns that are summed over the scored linear maps, from input h and error d of every position.

    ``directed``: whether they look at the directions.
    """

    columns: tuple[str, ...]
    directed: ClassVar[bool]

    def __init__(
        self, scored: ScoredLayers, directions: Directions | None, window: int, attention: str, given: str | None
    ) -> None:
        """``given``: the direction whose products M h come with what is captured; None: none.

        Raises UnsupportedModel where the model cannot be scored like this.
        """

    def visitor(self, positions: torch.Tensor, shape: tuple[int, int]) -> LayerVisitor:
        """``positions``: flat positions of a batch of ``shape`` whose sums are wanted."""

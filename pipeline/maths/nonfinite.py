"""NaN and infinity are named where they arise: which example, which module."""

from __future__ import annotations

import torch

from pipeline.maths.batch import Batch
from pipeline.maths.capture import Captured
from pipeline.maths.decoder import ScoredLayers
from pipeline.maths.ghost import ghost_pass


class NonFinite(ArithmeticError):
    """A value or a gradient is NaN or infinite. ``row`` is the example's index within the batch."""

    def __init__(self, row: int, where: str) -> None:
        super().__init__(f"NaN or infinity in {where} of example {row} of the batch")
        self.row, self.where = row, where


def locate(scored: ScoredLayers, batch: Batch, kernel: str) -> NonFinite:
    """Go through a batch that gave NaN or infinity one example at a time and name the first place where it shows."""
    for row in range(batch.shape[0]):
        places: list[str] = []

        def look(captured: Captured, places: list[str] = places) -> None:
            for what, tensor in (("input", captured.entering), ("gradient", captured.error)):
                if not bool(torch.isfinite(tensor).all()):
                    places.append(f"the {what} of {captured.map.name.removesuffix('.weight')}")

        losses = ghost_pass(scored, batch.rows(slice(row, row + 1)), look, kernel)
        if places:
            inputs = [place for place in places if "input" in place]
            return NonFinite(row, inputs[-1] if inputs else places[0])  # the earliest in the forward direction
        if not bool(torch.isfinite(losses).all()):
            return NonFinite(row, "the loss")
    return NonFinite(0, "the products with the directions (their scale exceeds the dtype)")

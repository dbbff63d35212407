"""What is most affected by a mask, row by row: the choices that a report shows rows of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.maths.masking import Bools, sums_by_row
from alphatoken.pipeline.report.choice import Choice, drawn
from alphatoken.pipeline.report.reading import Batch, lengths_of
from alphatoken.pipeline.report.shown_masks import ShownMask

ONLY, DROPPED, KEPT, CHANGED, RANDOM = "only", "dropped", "kept", "changed", "random"
# Of one mask; where there are several, each has fewer, so that the page does not grow with them.
SIZES = {ONLY: 60, DROPPED: 60, KEPT: 20, CHANGED: 40}
LEAST, RANDOM_SIZE = 8, 80


class Affected:
    """Offers rows to the choices of every mask. ``masks``: the first is the one that the others are compared with."""

    def __init__(self, masks: Sequence[ShownMask]) -> None:
        self.masks = tuple(masks)
        self.of: dict[tuple[int, str], Choice] = {}
        for number, mask in enumerate(masks):
            titles = {
                ONLY: f"keep nothing, or nothing but tokens of mask.always_keep, under {mask.name}",
                DROPPED: f"lose the largest share of their response under {mask.name}",
                KEPT: f"keep the largest share of their response under {mask.name}",
                CHANGED: f"are decided most differently under {mask.name} than under {masks[0].name}",
            }
            for kind, title in titles.items():
                if kind != CHANGED or number:
                    size = max(LEAST, SIZES[kind] // len(masks))
                    self.of[number, kind] = Choice(kind, title, size, number)
        self.random = Choice(RANDOM, "were drawn at random", RANDOM_SIZE)
        self.choices = (*self.of.values(), self.random)

    def offer(self, batch: Batch, kept: npt.NDArray[np.int64]) -> None:
        """``kept``: tokens of each row that each mask keeps, of pairs in both branches together, ``(masks, rows)``."""
        tokens = sum(lengths_of(one.rows) for one in batch.branches)
        some, chance = tokens > 0, drawn(batch)
        tie = np.minimum(tokens, 1e6) * 1e-9  # of equal shares the longer response first
        for number in range(len(self.masks)):
            only = only_always(batch, number)
            share = kept[number] / np.maximum(tokens, 1)
            self.of[number, ONLY].offer(chance, only & some, batch.first)
            self.of[number, DROPPED].offer(1 - share + tie, some & ~only & (share < 1), batch.first)
            self.of[number, KEPT].offer(share + tie, some & (share > 0) & ~only, batch.first)
            if number:
                changed = _changed(batch, number)
                self.of[number, CHANGED].offer(changed / np.maximum(tokens, 1) + tie, changed > 0, batch.first)
        self.random.offer(chance, np.ones(len(batch), np.bool_), batch.first)


def only_always(batch: Batch, number: int) -> Bools:
    """Rows that keep no response token by their value, ``(rows,)``; of pairs, in neither branch."""
    always, left = batch.masks[number].always, np.zeros(len(batch), np.int64)
    for one in batch.branches:
        kept = one.kept[number]
        if len(always):
            kept = kept & ~np.isin(one.rows.response_ids(), always)
        left += sums_by_row(kept, one.rows.offsets)
    return left == 0


def _changed(batch: Batch, number: int) -> npt.NDArray[np.int64]:
    """Tokens of each row that mask ``number`` decides otherwise than the first."""
    return np.sum([sums_by_row(one.kept[number] != one.kept[0], one.rows.offsets) for one in batch.branches], axis=0)

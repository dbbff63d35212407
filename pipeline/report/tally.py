"""What is counted over all response tokens, whichever masks are looked at later.

Every token has a code, one bit per mask: kept or not. Whatever is counted is counted per code, and from the counts of
codes follows what each mask keeps, and how far any two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.maths.masking import Bools, Floats, Ints, sums_by_row
from alphatoken.pipeline.report.histogram import BINS, Axis, axis_of
from alphatoken.pipeline.report.reading import BranchRows, lengths_of
from alphatoken.pipeline.report.sample import Sample

# Where groups of positions begin, counted from 1 at the first token of a response.
POSITIONS = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513, 1025, 2049, 4097)
DECILES = 10
MOST_SOURCES = 1000  # files that are counted by themselves; those that come later are counted together


@dataclass(frozen=True, slots=True)
class Counts:
    """``count``: ``(groups,)``; ``kept``: ``(masks, groups)``."""

    count: Ints
    kept: Ints


class Tally:
    """Counts of one branch, over ``masks`` masks; where bins stand is found from its sample."""

    def __init__(self, sample: Sample, masks: int) -> None:
        self.masks, self.codes = masks, 1 << masks
        self.axes: dict[str, Axis] = {}
        for name, values in sample.scores.items():
            if axis := axis_of(values):
                self.axes[name] = axis
        self.borders = _decile_borders(sample)
        self._bins = {name: np.zeros((BINS, self.codes), np.int64) for name in self.axes}
        self._positions = np.zeros((len(POSITIONS), self.codes), np.int64)
        self._deciles = np.zeros((len(self.borders) + 1, self.codes), np.int64)
        self._ids = np.zeros((masks + 1, 0), np.int64)
        self._sources: dict[str, Ints] = {}
        self.other_sources = np.zeros(masks + 1, np.int64)

    def add(self, found: BranchRows, kept_by_row: npt.NDArray[np.int64], sources: Sequence[str], of: Ints) -> None:
        """Count some rows. ``kept_by_row``: ``(masks, examples)``; ``of``: each example's place in ``sources``."""
        code = code_of(found.kept)
        for name, axis in self.axes.items():
            self._count(self._bins[name], axis.bins(found.scores[name]), code)
        place = np.arange(len(code)) - np.repeat(found.rows.offsets[:-1], lengths_of(found.rows)) + 1
        self._count(self._positions, np.searchsorted(POSITIONS, place, side="right") - 1, code)
        if len(self.borders):
            self._count(self._deciles, np.searchsorted(self.borders, found.scores["loss"], side="right"), code)
        self._count_ids(found.rows.response_ids(), found.kept)
        self._count_sources(np.vstack([lengths_of(found.rows), kept_by_row]), sources, of)

    def histogram(self, name: str) -> Counts:
        """Over the bins of a score that has an axis."""
        return self._by_mask(self._bins[name])

    def positions(self) -> Counts:
        """Over POSITIONS."""
        return self._by_mask(self._positions)

    def deciles(self) -> Counts:
        """Over groups of the loss, low to high, which ``borders`` keep apart; one group where there is no loss."""
        return self._by_mask(self._deciles)

    def ids(self) -> Counts:
        """Over token ids."""
        return Counts(self._ids[0], self._ids[1:])

    def sources(self) -> dict[str, Ints]:
        """File -> tokens, then tokens that each mask keeps."""
        return self._sources

    def agreement(self) -> npt.NDArray[np.float64]:
        """Jaccard index of the kept tokens of every two masks, ``(masks, masks)``; 1 where neither keeps anything."""
        codes, bits = self._positions.sum(0), _bits(self.masks)
        both = (bits * codes) @ bits.T
        own = np.diag(both)
        either = own[:, None] + own[None, :] - both
        return np.where(either > 0, both / np.maximum(either, 1), 1.0)

    def _count(self, into: Ints, groups: npt.NDArray[np.integer], code: npt.NDArray[np.int64]) -> None:
        into += np.bincount(groups * self.codes + code, minlength=into.size).reshape(into.shape)

    def _by_mask(self, counts: Ints) -> Counts:
        return Counts(counts.sum(1), _bits(self.masks) @ counts.T)

    def _count_ids(self, ids: npt.NDArray[np.int32], kept: Sequence[Bools]) -> None:
        if not len(ids):
            return
        if (wider := int(ids.max()) + 1) > self._ids.shape[1]:
            self._ids = np.pad(self._ids, ((0, 0), (0, wider - self._ids.shape[1])))
        size = self._ids.shape[1]
        self._ids[0] += np.bincount(ids, minlength=size)
        for first in range(0, len(kept), 2):  # two counters in the 53 whole bits of one weight
            low, high = kept[first], kept[first + 1] if first + 1 < len(kept) else kept[first]
            packed = np.bincount(ids, low + high * float(1 << 26), minlength=size).astype(np.int64)
            self._ids[1 + first] += packed & ((1 << 26) - 1)
            if first + 1 < len(kept):
                self._ids[2 + first] += packed >> 26

    def _count_sources(self, numbers: Ints, sources: Sequence[str], of: Ints) -> None:
        for index, source in enumerate(sources):
            own = numbers[:, of == index].sum(1)
            if source in self._sources:
                self._sources[source] += own
            elif len(self._sources) < MOST_SOURCES:
                self._sources[source] = own
            else:
                self.other_sources += own


def kept_by_row(found: BranchRows) -> npt.NDArray[np.int64]:
    """Kept tokens of every example, ``(masks, examples)``."""
    return np.array([sums_by_row(kept, found.rows.offsets) for kept in found.kept], np.int64)


def code_of(kept: Sequence[Bools]) -> npt.NDArray[np.int64]:
    """One bit per mask, ``(tokens,)``."""
    code = np.zeros(len(kept[0]), np.int64)
    for mask, own in enumerate(kept):
        code |= own.astype(np.int64) << mask
    return code


def _bits(masks: int) -> Ints:
    """``(masks, codes)``: whether each mask keeps the tokens of each code."""
    return np.array([(np.arange(1 << masks) >> mask) & 1 for mask in range(masks)], np.int64)


def _decile_borders(sample: Sample) -> Floats:
    """Up to nine losses that cut the sample into tenths; fewer where many tokens have the same loss."""
    loss = sample.scores.get("loss")
    if loss is None or not len(loss) or loss.min() == loss.max():
        return np.zeros(0, np.float32)
    borders = np.quantile(loss.astype(np.float64), np.linspace(0, 1, DECILES + 1)[1:-1]).astype(np.float32)
    return np.unique(borders)

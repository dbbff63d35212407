"""Where the threshold stands: one small class per mask.scope and mask.rule; those that look at all rows are readers (looks.py)."""

from __future__ import annotations

from collections.abc import Hashable
from copy import copy
from typing import Protocol

import numpy as np

from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.maths.group_select import GroupSelect, TokenGroups
from alphatoken.pipeline.maths.masking import (
    Floats,
    RankSelect,
    SparseCounts,
    order_keys,
    rank_of,
    thresholds_in_groups,
)
from alphatoken.pipeline.run.failure import RunFailed

KEEP_POSITIVE = np.nextafter(np.float32(0), np.float32(1))  # at least this is above 0
KEEP_ALL = np.float32(-np.inf)


class Threshold(Protocol):
    """Of all response tokens; ``values`` are theirs, flat."""

    def of(self, rows: PairedRows, values: Floats) -> tuple[np.float32 | Floats, Floats]:
        """The threshold of these rows, one number or one per token; and those of groups that end with these rows."""


class Fixed:
    """A number that is known beforehand (mask.rule=positive, mask.score=full)."""

    def __init__(self, threshold: np.float32) -> None:
        self.threshold = threshold

    def of(self, rows: PairedRows, values: Floats) -> tuple[np.float32 | Floats, Floats]:
        """The number."""
        return self.threshold, np.zeros(0, np.float32)


class OverDataSet:
    """mask.scope=dataset."""

    passes = 2

    def __init__(self, rho: float) -> None:
        self.rho, self.select, self.chosen = rho, RankSelect(), False
        self.threshold = np.float32(0)

    @property
    def key(self) -> Hashable:
        """The fraction has no say in the first pass."""
        return "ranks", self.select.bin

    def blank(self) -> OverDataSet:
        """As of a Reader."""
        other = OverDataSet(self.rho)
        other.select, other.chosen = self.select.blank(), self.chosen
        return other

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Count upper halves, then lower halves."""
        # The values are kept beside their keys, so that no other array has their id meanwhile.
        self.select.see_keys(rows.made(("keys", id(values)), lambda: (values, order_keys(values)))[1])

    def counted(self) -> SparseCounts:
        """As of a Reader."""
        return self.select.counted()

    def add(self, counted: SparseCounts) -> None:
        """As of a Reader."""
        self.select.add(counted)

    def next(self) -> None:
        """Choose the bin, then the threshold in it."""
        if self.chosen:
            self.threshold = self.select.threshold()
        else:
            self.select.choose(rank_of(self.rho, some_tokens(self.select.total)))
            self.chosen = True

    def of(self, rows: PairedRows, values: Floats) -> tuple[np.float32 | Floats, Floats]:
        """One number."""
        return self.threshold, np.zeros(0, np.float32)


class PerTokenId:
    """mask.scope=token_id: one threshold among the tokens of one id, and one for the rare ids together."""

    def __init__(self, rho: float, groups: TokenGroups) -> None:
        self.groups = groups
        self.select = GroupSelect(np.array([[rank_of(rho, size)] for size in groups.sizes.tolist()], np.int64))
        self.passes, self.left = self.select.passes, self.select.passes
        self.thresholds = np.zeros(0, np.float32)

    @property
    def key(self) -> Hashable:
        """Every one counts for itself."""
        return None

    def blank(self) -> PerTokenId:
        """As of a Reader."""
        other = copy(self)
        other.select = self.select.blank()
        return other

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Count one digit."""
        self.select.count(values, self.groups.of(rows.response_ids()))

    def counted(self) -> SparseCounts:
        """As of a Reader."""
        return self.select.counted()

    def add(self, counted: SparseCounts) -> None:
        """As of a Reader."""
        self.select.add(counted)

    def next(self) -> None:
        """Choose one digit."""
        self.select.choose()
        self.left -= 1
        if not self.left:
            self.thresholds = self.select.found()[:, 0]

    def of(self, rows: PairedRows, values: Floats) -> tuple[np.float32 | Floats, Floats]:
        """One number per token."""
        return self.thresholds[self.groups.of(rows.response_ids())], np.zeros(0, np.float32)


class Within:
    """mask.scope=example and mask.scope=batch: ``size`` consecutive examples of a part."""

    def __init__(self, rho: float, size: int) -> None:
        self.rho, self.size = rho, size

    def of(self, rows: PairedRows, values: Floats) -> tuple[np.float32 | Floats, Floats]:
        """One number per token, and per group that has any token."""
        return thresholds_in_groups(values, rows.offsets, self.size, self.rho)


def some_tokens(tokens: int) -> int:
    """``tokens``; raises RunFailed where there are none."""
    if not tokens:
        raise RunFailed("no prepared example has a response token: there is nothing to mask")
    return tokens

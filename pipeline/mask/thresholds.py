"""Where the threshold stands: one small class per mask.scope and mask.rule, fed with the rows pass by pass.

Each needs the rows ``passes`` times: ``see`` some rows with their values, then ``next`` at the end of a pass.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.maths.group_select import GroupSelect, TokenGroups
from alphatoken.pipeline.maths.masking import Floats, RankSelect, rank_of, thresholds_in_groups
from alphatoken.pipeline.run.failure import RunFailed

KEEP_POSITIVE = np.nextafter(np.float32(0), np.float32(1))  # at least this is above 0
KEEP_ALL = np.float32(-np.inf)


class Threshold(Protocol):
    """Of all response tokens; ``values`` are theirs, flat."""

    passes: int

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Take in some rows of the present pass."""

    def next(self) -> None:
        """End the present pass."""

    def of(self, rows: PairedRows, values: Floats) -> tuple[np.float32 | Floats, Floats]:
        """The threshold of these rows, one number or one per token; and those of groups that end with these rows."""


class Fixed:
    """A number that is known beforehand (mask.rule=positive, valuation.method=full)."""

    passes = 0

    def __init__(self, threshold: np.float32) -> None:
        self.threshold = threshold

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Not called."""

    def next(self) -> None:
        """Not called."""

    def of(self, rows: PairedRows, values: Floats) -> tuple[np.float32 | Floats, Floats]:
        """The number."""
        return self.threshold, np.zeros(0, np.float32)


class OverDataSet:
    """mask.scope=dataset."""

    passes = 2

    def __init__(self, rho: float) -> None:
        self.rho, self.select, self.chosen = rho, RankSelect(), False
        self.threshold = np.float32(0)

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Count upper halves, then lower halves."""
        (self.select.refine if self.chosen else self.select.count)(values)

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

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Count one digit."""
        self.select.count(values, self.groups.of(rows.response_ids()))

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

    passes = 0

    def __init__(self, rho: float, size: int) -> None:
        self.rho, self.size = rho, size

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Not called."""

    def next(self) -> None:
        """Not called."""

    def of(self, rows: PairedRows, values: Floats) -> tuple[np.float32 | Floats, Floats]:
        """One number per token, and per group that has any token."""
        return thresholds_in_groups(values, rows.offsets, self.size, self.rho)


def some_tokens(tokens: int) -> int:
    """``tokens``; raises RunFailed where there are none."""
    if not tokens:
        raise RunFailed("no prepared example has a response token: there is nothing to mask")
    return tokens

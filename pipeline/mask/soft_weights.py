"""mask.rule=weight: the weight of every response token, by its rank within the group that mask.scope names."""

from __future__ import annotations

from collections.abc import Hashable
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.maths.exact_sum import ExactSum
from alphatoken.pipeline.maths.group_select import GroupSelect, TokenGroups, select_in_memory
from alphatoken.pipeline.maths.loss_ramp import STEPS, border_ranks, count_steps, step_weights, steps_of
from alphatoken.pipeline.maths.masking import Bools, Floats, Ints, SparseCounts


class WeightsOverDataSet:
    """mask.scope=dataset and token_id: a reader (looks.py)."""

    def __init__(self, rho: float, groups: TokenGroups) -> None:
        self.rho, self.groups = rho, groups
        self.select = GroupSelect(border_ranks(rho, groups.sizes))
        self.passes, self.left = self.select.passes + 1, self.select.passes
        self.borders = np.zeros(0, np.float32)
        self.counts = np.zeros((len(groups.sizes), STEPS + 2), np.int64)
        self.weights = np.zeros(0, np.float32)

    @property
    def key(self) -> Hashable:
        """Every one counts for itself."""
        return None

    def blank(self) -> WeightsOverDataSet:
        """As of a Reader."""
        other = copy(self)
        other.select, other.counts = self.select.blank(), np.zeros_like(self.counts)
        return other

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Find the borders of the steps digit by digit, then count the tokens between them."""
        groups = self._of(rows)
        if self.left:
            self.select.count(values, groups)
        else:
            count_steps(steps_of(values, groups, self.borders), groups, self.counts)

    def counted(self) -> SparseCounts:
        """As of a Reader."""
        return self.select.counted() if self.left else SparseCounts.of(self.counts)

    def add(self, counted: SparseCounts) -> None:
        """As of a Reader."""
        if self.left:
            self.select.add(counted)
        else:
            counted.add_to(self.counts)

    def next(self) -> None:
        """End a pass."""
        if self.left:
            self.select.choose()
            self.left -= 1
            self.borders = self.borders if self.left else self.select.found()
        else:
            self.weights = step_weights(self.rho, self.counts)

    def of(self, rows: PairedRows, values: Floats) -> Floats:
        """(response tokens,) float32 in [0, 1]."""
        groups = self._of(rows)
        return self.weights[groups, steps_of(values, groups, self.borders)]

    def _of(self, rows: PairedRows) -> Ints:
        return self.groups.of(rows.response_ids())


class WeightsWithin:
    """mask.scope=example and batch: groups of ``size`` consecutive examples, which are all there."""

    def __init__(self, rho: float, size: int) -> None:
        self.rho, self.size = rho, size

    def of(self, rows: PairedRows, values: Floats) -> Floats:
        """(response tokens,) float32 in [0, 1]."""
        groups = np.repeat(np.arange(len(rows)) // self.size, np.diff(rows.offsets))
        groups = np.unique(groups, return_inverse=True)[1]  # groups without a token have no number
        borders = select_in_memory(values, groups, border_ranks(self.rho, np.bincount(groups)))
        steps, counts = steps_of(values, groups, borders), np.zeros((len(borders), STEPS + 2), np.int64)
        count_steps(steps, groups, counts)
        return step_weights(self.rho, counts)[groups, steps]


@dataclass(slots=True)
class WeightCounts:
    """What the weights of all response tokens are, for the summary."""

    tokens: int = 0
    total: ExactSum = field(default_factory=ExactSum)
    ones: int = 0
    zeros: int = 0
    raised: int = 0

    def add(self, weights: Floats, always: Bools) -> Floats:
        """Count some tokens; returns their weights, 1.0 where ``always``."""
        final = np.where(always, np.float32(1), weights)
        self.tokens += len(final)
        self.total.add(final.astype(np.float64).sum())
        self.ones += int((final == 1).sum())
        self.zeros += int((final == 0).sum())
        self.raised += int((final > weights).sum())
        return final

    def merge(self, other: WeightCounts) -> None:
        """Take in what another one counted."""
        self.tokens, self.ones = self.tokens + other.tokens, self.ones + other.ones
        self.zeros, self.raised = self.zeros + other.zeros, self.raised + other.raised
        self.total.merge(other.total)

    def as_json(self) -> dict[str, Any]:
        """Needs at least one token."""
        return {
            "mean": float(self.total) / self.tokens,
            "fraction_one": self.ones / self.tokens,
            "fraction_zero": self.zeros / self.tokens,
            "raised_by_always_keep": self.raised,
        }

"""mask.rule=weight: the weight of every response token, by its rank within the group that mask.scope names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.maths.group_select import GroupSelect, TokenGroups, select_in_memory
from alphatoken.pipeline.maths.loss_ramp import STEPS, border_ranks, count_steps, step_weights, steps_of
from alphatoken.pipeline.maths.masking import Bools, Floats, Ints


class WeightsOverDataSet:
    """mask.scope=dataset and token_id: fed with the rows ``passes`` times, as the classes of `thresholds` are."""

    def __init__(self, rho: float, groups: TokenGroups) -> None:
        self.rho, self.groups = rho, groups
        self.select = GroupSelect(border_ranks(rho, groups.sizes))
        self.passes, self.left = self.select.passes + 1, self.select.passes
        self.borders = np.zeros(0, np.float32)
        self.counts = np.zeros((len(groups.sizes), STEPS + 2), np.int64)
        self.weights = np.zeros(0, np.float32)

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Find the borders of the steps digit by digit, then count the tokens between them."""
        groups = self._of(rows)
        if self.left:
            self.select.count(values, groups)
        else:
            count_steps(steps_of(values, groups, self.borders), groups, self.counts)

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

    passes = 0

    def __init__(self, rho: float, size: int) -> None:
        self.rho, self.size = rho, size

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Not called."""

    def next(self) -> None:
        """Not called."""

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
    total: float = 0.0
    ones: int = 0
    zeros: int = 0
    raised: int = 0

    def add(self, weights: Floats, always: Bools) -> Floats:
        """Count some tokens; returns their weights, 1.0 where ``always``."""
        final = np.where(always, np.float32(1), weights)
        self.tokens += len(final)
        self.total += float(final.astype(np.float64).sum())
        self.ones += int((final == 1).sum())
        self.zeros += int((final == 0).sum())
        self.raised += int((final > weights).sum())
        return final

    def as_json(self) -> dict[str, Any]:
        """Needs at least one token."""
        return {
            "mean": self.total / self.tokens,
            "fraction_one": self.ones / self.tokens,
            "fraction_zero": self.zeros / self.tokens,
            "raised_by_always_keep": self.raised,
        }

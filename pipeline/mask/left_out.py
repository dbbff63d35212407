"""Tokens that are not kept whatever their value: mask.skip_first and mask.least_stable."""

from __future__ import annotations

from typing import Any

import numpy as np
from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.mask.thresholds import some_tokens
from alphatoken.pipeline.maths.masking import Bools, Floats, Ints, RankSelect, objective, rank_of, sums_by_row
from alphatoken.pipeline.settings import MaskSettings


class LeftOut:
    """Both rules, and how many tokens each has left out."""

    def __init__(self, settings: MaskSettings) -> None:
        self.skip_first, self.per_norm = settings.skip_first or 0, settings.divide_by_gradient_norm
        self.least_stable = LeastStable(settings.least_stable) if settings.least_stable else None
        self.first_tokens = self.least_stable_tokens = self.emptied = 0

    def of(self, rows: PairedRows, count: bool = False) -> Bools:
        """The tokens that are left out, ``(response tokens,)``; ``count`` once when they are decided on."""
        first = self.first(rows)
        unstable = np.zeros(len(first), np.bool_)
        if self.least_stable is not None:
            unstable = self.stability(rows) < self.least_stable.border
        if count:
            self.first_tokens += int(first.sum())
            self.least_stable_tokens += int(unstable.sum())
        return first | unstable

    def first(self, rows: PairedRows) -> Bools:
        """Those that mask.skip_first leaves out."""
        return first_of_responses(rows, self.skip_first)

    def count_emptied(self, offsets: Ints, left_out: Bools, always: Bools) -> None:
        """Count the examples of whose response tokens none is left to choose from but those that are always kept."""
        choice, lost = (sums_by_row(some & ~always, offsets) for some in (~left_out, left_out))
        self.emptied += int(((choice == 0) & (lost > 0)).sum())

    def stability(self, rows: PairedRows) -> Floats:
        """What ``least_stable`` is fed with."""
        return objective(rows.components, "stability", self.per_norm).astype(np.float32)

    def as_json(self) -> dict[str, Any]:
        """For summary.json; a token may be in both counts."""
        border = None if self.least_stable is None else float(self.least_stable.border)
        return {
            "first": self.first_tokens,
            "least_stable": self.least_stable_tokens,
            "stability_below": border,
            "examples_without_choice": self.emptied,
        }


class LeastStable:
    """mask.least_stable: the given fraction of all tokens with the lowest stability; fed with stability.

    Tokens that tie at the border are not among them, so that they are never more than were asked for: none where
    stability is the same for all.
    """

    passes = 2

    def __init__(self, fraction: float) -> None:
        self.fraction, self.select, self.chosen = fraction, RankSelect(), False
        self.border = np.float32(-np.inf)  # lower stability is among them

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Count upper halves, then lower halves."""
        (self.select.refine if self.chosen else self.select.count)(-values)

    def next(self) -> None:
        """Choose the bin, then the border in it."""
        if self.chosen:
            self.border = -self.select.threshold()
        else:
            tokens = some_tokens(self.select.total)
            self.select.choose(min(tokens, rank_of(self.fraction, tokens) + 1))
            self.chosen = True


def lowest_where(left_out: Bools, values: Floats) -> Floats:
    """``values`` with those of tokens that are left out below all others."""
    return np.where(left_out, np.float32(-np.inf), values)


def first_of_responses(rows: PairedRows, count: int) -> Bools:
    """The first ``count`` tokens of every response, ``(response tokens,)``; each turn of a conversation is one."""
    response = rows.response
    if not count:
        return np.zeros(int(response.sum()), np.bool_)
    before = np.concatenate([[False], response[:-1]])
    before[rows.token_offsets()[:-1][np.diff(rows.token_offsets()) > 0]] = False  # the row before has ended
    starts = response & ~before
    place = np.arange(len(response))
    since = place - np.maximum.accumulate(np.where(starts, place, -1))
    return since[response] < count

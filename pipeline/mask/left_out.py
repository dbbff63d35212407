"""Tokens that are not kept whatever their value: mask.skip_first and mask.least_stable."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pyarrow.compute as pc

from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.mask.thresholds import some_tokens
from alphatoken.pipeline.maths.masking import Bools, Floats, RankSelect, SparseCounts, rank_of
from alphatoken.pipeline.prepare.windows import LATER_WINDOW


class LeastStable:
    """mask.least_stable: the given fraction of all tokens with the lowest stability; fed with stability.

    Tokens that tie at the border are not among them, so that they are never more than were asked for: none where
    stability is the same for all.
    """

    passes = 2

    def __init__(self, fraction: float) -> None:
        self.fraction, self.select, self.chosen = fraction, RankSelect(), False
        self.border = np.float32(-np.inf)  # lower stability is among them

    @property
    def key(self) -> Hashable:
        """The fraction has no say in the first pass."""
        return "lowest", self.select.bin

    def blank(self) -> LeastStable:
        """As of a Reader."""
        other = LeastStable(self.fraction)
        other.select, other.chosen = self.select.blank(), self.chosen
        return other

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Count upper halves, then lower halves."""
        (self.select.refine if self.chosen else self.select.count)(-values)

    def counted(self) -> SparseCounts:
        """As of a Reader."""
        return self.select.counted()

    def add(self, counted: SparseCounts) -> None:
        """As of a Reader."""
        self.select.add(counted)

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


def first_of_responses(rows: PairedRows, count: int, shortest: int = 1) -> Bools:
    """The first ``count`` tokens of every response of at least ``shortest`` tokens, ``(response tokens,)``; each turn of a
    conversation is one.

    What stands at index 1 of a later window of a long row goes on with the response of the window before.
    """
    response = rows.response
    if not count:
        return np.zeros(int(response.sum()), np.bool_)
    before = np.concatenate([[False], response[:-1]])
    offsets = rows.token_offsets()
    before[offsets[:-1][np.diff(offsets) > 0]] = False  # the row before has ended
    starts = response & ~before
    place = np.arange(len(response))
    begun = np.where(starts, place, -1)
    second = offsets[:-1][np.diff(offsets) > 1] + 1
    if (at_once := second[starts[second]]).size:
        of_row = np.searchsorted(offsets, at_once, side="right") - 1
        later = pc.match_substring_regex(rows.ids, LATER_WINDOW).to_numpy()[of_row]
        begun[at_once[later]] -= count
    since = place - np.maximum.accumulate(begun)
    first: Bools = since[response] < count
    if shortest > 1:
        number = np.cumsum(starts)[response] - 1  # of the response, or of its part in this row
        first &= np.bincount(number)[number] >= shortest
    return first

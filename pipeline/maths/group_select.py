"""Exact order statistics of many groups of one stream at once, in memory bounded by the groups.

mask.scope=token_id takes one threshold per token id. A selection with 16-bit digits (`RankSelect`) takes 1 MiB per
group; here the digits are narrow and the stream is read more often. numpy alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.maths.masking import Floats, Ints, SparseCounts, float_of_key, order_keys

WIDE_DIGITS_UP_TO = 1 << 14  # wanted order statistics; 32 MiB of counts


class TokenGroups:
    """The groups of mask.scope=token_id: one per token id, the ids with few occurrences pooled into one.

        groups = TokenGroups()
        for ids in stream: groups.count(ids)
        groups.close(rare=32)
        groups.of(ids)   # the group number of every token

    Two int64 per id up to the largest one that occurs, whatever the length of the stream. Group numbers go up with the
    ids; the pool, where there is one, comes last.
    """

    def __init__(self) -> None:
        self._occurrences = np.zeros(0, np.int64)
        self._group = np.zeros(0, np.int64)
        self.sizes = np.zeros(0, np.int64)  # (groups,): tokens of each group
        self.pooled_ids = self.pooled_tokens = 0

    def count(self, ids: Ints | npt.NDArray[np.int32]) -> None:
        """Count some tokens' ids, all of them at least 0."""
        found = np.bincount(ids, minlength=len(self._occurrences))
        found[: len(self._occurrences)] += self._occurrences
        self._occurrences = found

    def counted(self) -> SparseCounts:
        """How often each id occurred so far; the places are the ids."""
        return SparseCounts.of(self._occurrences)

    def add(self, counted: SparseCounts) -> None:
        """Take in what others have counted."""
        missing = int(counted.places[-1]) + 1 - len(self._occurrences) if len(counted.places) else 0
        if missing > 0:
            self._occurrences = np.append(self._occurrences, np.zeros(missing, np.int64))
        counted.add_to(self._occurrences)

    def close(self, rare: float) -> None:
        """End the count; ids that occur fewer than ``rare`` times are pooled, all of them with infinity."""
        present = self._occurrences > 0
        own = present & (self._occurrences >= rare)
        pooled = present & ~own
        self._group = np.where(pooled, own.sum(), np.cumsum(own) - 1)
        self.pooled_ids, self.pooled_tokens = int(pooled.sum()), int(self._occurrences[pooled].sum())
        self.sizes = np.append(self._occurrences[own], self._occurrences[pooled].sum() if pooled.any() else [])
        self.sizes = self.sizes.astype(np.int64)

    def as_json(self) -> dict[str, int]:
        """For the summary."""
        return {"groups": len(self.sizes), "rare_ids": self.pooled_ids, "tokens_of_rare_ids": self.pooled_tokens}

    def of(self, ids: Ints | npt.NDArray[np.int32]) -> Ints:
        """Group numbers, ``(tokens,)``; the ids must have been counted."""
        return self._group[ids]


class GroupSelect:
    """The exact k-th largest float32 of every group of a stream that can be read ``passes`` times.

    ``ranks``: (groups, wanted), each from 1 to the group's size. A radix selection from the highest digit down: a pass
    counts, for each wanted order statistic, the next digit of the values that begin with the digits found so far. The
    counts take 2 KiB per wanted order statistic in 4 passes of 8 bits, and 128 bytes in 8 passes of 4 bits where
    more than WIDE_DIGITS_UP_TO are wanted: 6 MiB for the thresholds of 49,000 ids, twice that while a pass ends.
    -0.0 equals 0.0; NaN raises ValueError, and so does a pass that sees other values than the one before.

        select = GroupSelect(ranks)
        for _ in range(select.passes):
            for values, groups in stream: select.count(values, groups)
            select.choose()
        select.found()
    """

    def __init__(self, ranks: Ints) -> None:
        self.bits = 8 if ranks.size <= WIDE_DIGITS_UP_TO else 4
        self.passes = 32 // self.bits
        self._left = ranks.astype(np.int64)  # the rank among the values that begin with the digits found so far
        self._prefix = np.zeros(ranks.shape, np.uint64)
        self._expected: Ints | None = None
        self._counts = np.zeros((*ranks.shape, 1 << self.bits), np.int64)
        self._shift = 32

    def blank(self) -> GroupSelect:
        """One that counts the same in the present pass, and has counted nothing yet."""
        other = GroupSelect(self._left)
        other.bits, other.passes, other._prefix, other._shift = self.bits, self.passes, self._prefix, self._shift
        return other

    def counted(self) -> SparseCounts:
        """What was counted in the present pass."""
        return SparseCounts.of(self._counts)

    def add(self, counted: SparseCounts) -> None:
        """Take in what another one counted in the present pass."""
        counted.add_to(self._counts)

    def count(self, values: Floats, groups: Ints) -> None:
        """Count some values, ``(tokens,)`` with their group numbers, in the present pass."""
        keys = order_keys(values).astype(np.uint64)
        begin = keys >> np.uint64(self._shift)
        digits = (keys >> np.uint64(self._shift - self.bits)).astype(np.int64) & ((1 << self.bits) - 1)
        flat, wanted = self._counts.reshape(-1), self._counts.shape[1]
        for place in range(wanted):
            inside = np.flatnonzero(begin == self._prefix[groups, place])
            np.add.at(flat, (groups[inside] * wanted + place) << self.bits | digits[inside], 1)

    def choose(self) -> None:
        """End a pass: one more digit of every order statistic is known."""
        reached = np.cumsum(self._counts[..., ::-1], axis=-1)
        if self._expected is None:
            if (self._left < 1).any() or (self._left > reached[..., -1]).any():
                raise ValueError("a group has fewer values than the rank that is wanted of it")
        elif (reached[..., -1] != self._expected).any():
            raise ValueError("a pass did not see the values of the one before")
        steps = (reached < self._left[..., None]).sum(axis=-1)
        digits = (1 << self.bits) - 1 - steps
        self._expected = np.take_along_axis(self._counts, digits[..., None], axis=-1)[..., 0]
        self._left -= np.take_along_axis(reached, steps[..., None], axis=-1)[..., 0] - self._expected
        self._prefix = self._prefix << np.uint64(self.bits) | digits.astype(np.uint64)
        self._shift -= self.bits
        if self._shift:
            self._counts[:] = 0
        else:
            self._counts = np.zeros((*self._counts.shape[:2], 0), np.int64)  # no longer needed

    def found(self) -> Floats:
        """The order statistics, (groups, wanted)."""
        if self._shift:
            raise ValueError(f"the stream has to be read {self.passes} times")
        return float_of_key(self._prefix.astype(np.uint32))


def select_in_memory(values: Floats, groups: Ints, ranks: Ints) -> Floats:
    """As GroupSelect for values that are all there: ``ranks`` and result (groups, wanted); no group is empty."""
    order = np.lexsort((~order_keys(values), groups))
    starts = np.searchsorted(groups[order], np.arange(len(ranks)))
    return values[order[starts[:, None] + ranks - 1]]

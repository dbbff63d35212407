"""Which tokens are kept, and what was decided, in numbers: one branch of the data, rows by rows, in one order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from alphatoken.data_schemas import KEPT, LOSS_WEIGHT
from alphatoken.pipeline.mask.looks import RANKED
from alphatoken.pipeline.mask.paired_rows import IGNORED, PairedRows
from alphatoken.pipeline.mask.passes import Found
from alphatoken.pipeline.mask.soft_weights import WeightCounts
from alphatoken.pipeline.mask.summary import ColumnMoments, LeftOutCounts, MaskCounts, RowLengths
from alphatoken.pipeline.mask.thresholds import KEEP_ALL
from alphatoken.pipeline.maths.masking import RANDOM, Bools, Ints, keep_flat, sums_by_row

LOWEST = np.finfo(np.float32).min  # of finite values: the threshold where only tokens that are left out lie below


@dataclass(slots=True)
class Tally:
    """What was decided, in numbers."""

    counts: MaskCounts = field(default_factory=MaskCounts)
    left_out: LeftOutCounts = field(default_factory=LeftOutCounts)
    soft: WeightCounts = field(default_factory=WeightCounts)
    lengths: RowLengths = field(default_factory=RowLengths)

    def merge(self, other: Tally) -> None:
        """Take in what was decided of other rows."""
        self.counts.merge(other.counts)
        self.left_out.merge(other.left_out)
        self.soft.merge(other.soft)
        self.lengths.merge(other.lengths)


class Decider:
    """Decides rows by what the passes have found; what it has decided is counted in a tally.

    ``always``: ids that are always kept. ``hard``: whether values decide which labels stay. ``columns``: of values/, those that
    are counted.
    """

    def __init__(self, found: Found, always: np.ndarray, hard: bool, columns: Sequence[str]) -> None:
        self.found, self.always, self.hard = found, always, hard
        self.columns = tuple(name for name in columns if name not in (KEPT, RANDOM))
        self.value_key, self.alone = found.valuing.key, found.valuing.without_stability()
        self.alone_key, self.always_key = self.alone.key, ("always", tuple(always.tolist()))

    def decide(self, rows: PairedRows, tally: Tally) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens are kept, bool, and their soft weights, float32: ``(tokens,)`` over all of ``rows``."""
        found, valuing, settings = self.found, self.found.valuing, self.found.valuing.settings
        key = self.value_key
        values = rows.made(("values", key), lambda: valuing.values(rows))
        ranked = rows.made((RANKED, key), lambda: valuing.ranked(rows))
        first, unstable, harmful = rows.made(
            ("left out", key), lambda: (valuing.first(rows), valuing.least_stable(rows), valuing.harmful(rows))
        )
        threshold, of_groups = found.threshold.of(rows, ranked)
        counts = tally.counts
        counts.thresholds.add(np.maximum(of_groups, LOWEST))
        # A group may have none but tokens that are left out; where values do not decide all labels stay as they are.
        values_decide = settings.rule != "weight" and (self.hard or settings.score == "full")
        floor = LOWEST if values_decide else KEEP_ALL
        threshold = np.maximum(threshold, floor)
        always = rows.made(self.always_key, lambda: _among(rows, self.always))
        tally.lengths.add(np.diff(rows.token_offsets()))
        tally.left_out.add(rows.offsets, first, unstable, harmful, always)
        fewest = _fewest(settings.min_kept, rows.offsets, always)
        inside = keep_flat(ranked, rows.offsets, threshold, always, fewest, never=harmful)
        columns = {
            name: rows.made(("moments", name), partial(ColumnMoments.of, rows.components[name]))
            for name in self.columns
        }
        columns["value"] = rows.made(("moments of values", key), lambda: ColumnMoments.of(values))
        passed = ranked >= threshold
        without_stability = passed
        if self.alone_key != key:
            alone = rows.made((RANKED, self.alone_key), lambda: self.alone.ranked(rows))
            without_stability = alone >= np.maximum(found.alone.of(rows, alone)[0], floor)
        counts.add(rows.offsets, columns, inside, passed, always, without_stability)
        kept, weights = np.zeros(len(rows.response), np.bool_), np.zeros(0, np.float32)
        kept[rows.response] = inside
        if settings.rule == "weight":
            weights = np.zeros(len(rows.response), np.float32)
            left_out = first | unstable | harmful
            soft = found.soft.of(rows, ranked) if found.soft else np.ones(len(values), np.float32)
            weights[rows.response] = tally.soft.add(np.where(left_out, np.float32(0), soft), always)
        return kept, weights


@dataclass(frozen=True, slots=True)
class Written:
    """One mask that is written. ``deciders``: by branch. ``fingerprint``, ``schema``: of its parts."""

    name: str
    schema: pa.Schema
    fingerprint: str
    deciders: dict[str, Decider]


@contextmanager
def in_parallel(threads: int, count: int) -> Iterator[Callable[[Callable[[int], None]], None]]:
    """What does a thing with each of the numbers below ``count``, ``threads`` of them at once, and waits for all."""
    if min(threads, count) <= 1:

        def one_by_one(do: Callable[[int], None]) -> None:
            for index in range(count):
                do(index)

        yield one_by_one
        return
    with ThreadPoolExecutor(min(threads, count)) as pool:

        def at_once(do: Callable[[int], None]) -> None:
            for _ in pool.map(do, range(count)):
                pass

        yield at_once


def _among(rows: PairedRows, ids: np.ndarray) -> Bools:
    """Which response tokens are of these ids, ``(response tokens,)``."""
    return np.isin(rows.response_ids(), ids)


def _fewest(min_kept: int | float, offsets: Ints, always: Bools) -> int | Ints:
    """Tokens that examples keep at least; of a fraction one number for each, ``(examples,)``."""
    if min_kept >= 1 or not min_kept:
        return int(min_kept)
    kept_anyway = sums_by_row(always, offsets)
    share = Fraction(str(min_kept))  # as it was written: in floats 0.07 of 100 would be 8
    return kept_anyway + -((np.diff(offsets) - kept_anyway) * -share.numerator // share.denominator)


def mask_columns(rows: PairedRows, kept: np.ndarray, weights: np.ndarray, names: Sequence[str]) -> list[pa.ListArray]:
    """The columns ``names`` of a masks table: all tokens attended to, labels -100 outside of ``kept``."""
    assert rows.input_ids is not None
    made: dict[str, Any] = {
        "input_ids": rows.input_ids.flatten(),
        "attention_mask": rows.made("attention mask", lambda: pa.array(np.ones(len(kept), np.int8))),
        "labels": pa.array(np.where(kept, rows.labels.flatten().to_numpy(), np.int32(IGNORED))),
    }
    offsets = rows.made("offsets", lambda: pa.array(rows.token_offsets(), pa.int32()))
    for name in names:
        if name not in made:
            made[name] = pa.array(weights if name == LOSS_WEIGHT else kept.astype(np.int8))
    return [pa.ListArray.from_arrays(offsets, made[name]) for name in names]

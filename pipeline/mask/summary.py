"""What a mask did, in numbers: counted while it is written, in one order, so that the summary has the same bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.maths.exact_sum import ExactSum
from alphatoken.pipeline.maths.masking import Bools, Floats, Ints, RankSelect, sums_by_row

USUAL_LENGTH = 1024  # tokens: where trainers cut unless they are told otherwise


@dataclass(frozen=True, slots=True)
class ColumnMoments:
    """What is the same for every mask of a column of some rows. ``exact``: the column, float64."""

    exact: npt.NDArray[np.float64]
    total: float
    squares: float
    least: float
    most: float
    negative: int

    @classmethod
    def of(cls, values: Floats) -> ColumnMoments:
        """np.sum adds in one fixed order; a dot product's order depends on the library behind it."""
        exact = values.astype(np.float64)
        if not len(values):
            return cls(exact, 0.0, 0.0, np.inf, -np.inf, 0)
        extremes, negative = (float(values.min()), float(values.max())), int(np.count_nonzero(values < 0))
        return cls(exact, float(exact.sum()), float(np.square(exact).sum()), *extremes, negative)


@dataclass(slots=True)
class _Moments:
    """Sums over response tokens of one column: float64 within some rows, exact over all of them."""

    count: int = 0
    total: ExactSum = field(default_factory=ExactSum)
    squares: ExactSum = field(default_factory=ExactSum)
    least: float = np.inf
    most: float = -np.inf
    negative: int = 0
    kept: int = 0
    kept_total: ExactSum = field(default_factory=ExactSum)

    def add(self, some: ColumnMoments, kept: Ints) -> None:
        """``kept``: the places of the kept tokens."""
        if not len(some.exact):
            return
        self.count += len(some.exact)
        self.total.add(some.total)
        self.squares.add(some.squares)
        self.least, self.most = min(self.least, some.least), max(self.most, some.most)
        self.negative += some.negative
        self.kept += len(kept)
        self.kept_total.add(some.exact.take(kept).sum())

    def merge(self, other: _Moments) -> None:
        self.count, self.negative = self.count + other.count, self.negative + other.negative
        self.kept += other.kept
        for own, theirs in (
            (self.total, other.total),
            (self.squares, other.squares),
            (self.kept_total, other.kept_total),
        ):
            own.merge(theirs)
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)

    def as_json(self) -> dict[str, Any]:
        masked, total, kept_total = self.count - self.kept, float(self.total), float(self.kept_total)
        return {
            "mean": total / self.count,
            "rms": float(np.sqrt(float(self.squares) / self.count)),
            "min": self.least,
            "max": self.most,
            "negative_fraction": self.negative / self.count,
            "mean_kept": kept_total / self.kept if self.kept else None,
            "mean_masked": (total - kept_total) / masked if masked else None,
        }


@dataclass(slots=True)
class _Thresholds:
    """Thresholds of example or batch groups: extremes exact, the median to about 8 bits, in bounded memory."""

    least: float = np.inf
    most: float = -np.inf
    ranks: RankSelect = field(default_factory=RankSelect)

    def add(self, thresholds: Floats) -> None:
        if len(thresholds):
            self.least, self.most = min(self.least, float(thresholds.min())), max(self.most, float(thresholds.max()))
            self.ranks.count(thresholds)

    def merge(self, other: _Thresholds) -> None:
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.ranks.add(other.ranks.counted())

    def as_json(self) -> dict[str, Any]:
        groups = self.ranks.total
        median = float(self.ranks.choose((groups + 1) // 2))
        # The bin's lower border may lie just outside of what was seen.
        return {
            "groups": groups,
            "min": self.least,
            "median": min(max(median, self.least), self.most),
            "max": self.most,
        }


class MaskCounts:
    """Counts and statistics over all response tokens."""

    def __init__(self) -> None:
        self.columns: dict[str, _Moments] = {}
        self.thresholds = _Thresholds()
        self.rows = self.rows_with_nothing_kept = self.rows_with_only_always = 0
        self.only_always = self.only_minimum = self.changed = 0

    def add(
        self,
        offsets: Ints,
        columns: dict[str, ColumnMoments],
        kept: Bools,
        passed: Bools,
        always: Bools,
        without_stability: Bools,
    ) -> None:
        """Count some examples; arrays are over their response tokens, ``offsets`` ``(examples + 1,)``.

        ``columns``: those that were read, and ``value``. ``passed``: the tokens that pass the
        threshold. ``without_stability``: those that would if stability had no say.
        """
        places = np.flatnonzero(kept)
        for name, column in columns.items():
            self.columns.setdefault(name, _Moments()).add(column, places)
        self.rows += len(offsets) - 1
        in_rows = sums_by_row(kept, offsets)
        self.rows_with_nothing_kept += int((in_rows == 0).sum())
        nothing_else = sums_by_row(kept & ~always, offsets) == 0
        self.rows_with_only_always += int((nothing_else & (in_rows > 0)).sum())
        self.only_always += int((~passed & always).sum())
        self.only_minimum += int((kept & ~passed & ~always).sum())
        self.changed += int((passed != without_stability).sum())

    def merge(self, other: MaskCounts) -> None:
        """Take in what another one counted; the thresholds too."""
        for name, moments in other.columns.items():
            self.columns.setdefault(name, _Moments()).merge(moments)
        self.thresholds.merge(other.thresholds)
        for name in (
            "rows",
            "rows_with_nothing_kept",
            "rows_with_only_always",
            "only_always",
            "only_minimum",
            "changed",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def response_tokens(self) -> int:
        """Counted so far."""
        return self.columns["value"].count if self.columns else 0

    def as_json(self) -> dict[str, Any]:
        """Needs at least one response token."""
        tokens, kept = self.response_tokens, self.columns["value"].kept
        return {
            "rows": self.rows,
            "rows_with_nothing_kept": self.rows_with_nothing_kept,
            "rows_with_only_always_kept": self.rows_with_only_always,
            "response_tokens": tokens,
            "kept_tokens": kept,
            "kept_fraction": kept / tokens,
            "kept_only_by_always_keep": self.only_always,
            "kept_only_by_min_kept": self.only_minimum,
            "decisions_changed_by_stability": self.changed / tokens,
            "columns": {name: moments.as_json() for name, moments in self.columns.items()},
        }


@dataclass(slots=True)
class RowLengths:
    """How long rows are, prompt and response together: what a trainer's longest length is chosen by."""

    longest: int = 0
    over: int = 0  # rows of more than USUAL_LENGTH tokens

    def add(self, lengths: npt.NDArray[np.integer[Any]]) -> None:
        """``lengths``: tokens of some examples, ``(examples,)``."""
        if len(lengths):
            self.longest = max(self.longest, int(lengths.max()))
            self.over += int((lengths > USUAL_LENGTH).sum())

    def merge(self, other: RowLengths) -> None:
        """Take in what another one saw."""
        self.longest, self.over = max(self.longest, other.longest), self.over + other.over

    def as_json(self) -> dict[str, Any]:
        return {"longest_row": self.longest, f"rows_over_{USUAL_LENGTH}": self.over}


@dataclass(slots=True)
class LeftOutCounts:
    """Tokens that mask.skip_first, mask.least_stable and mask.require have left out; a token may be in several counts."""

    first: int = 0
    least_stable: int = 0
    harmful: int = 0
    emptied: int = 0  # examples of whose response tokens none is left to choose from but those that are always kept

    def add(self, offsets: Ints, first: Bools, unstable: Bools, harmful: Bools, always: Bools) -> None:
        """Count some examples, as ``MaskCounts.add``."""
        left_out = first | unstable | harmful
        self.first += int(first.sum())
        self.least_stable += int(unstable.sum())
        self.harmful += int(harmful.sum())
        choice, lost = (sums_by_row(some & ~always, offsets) for some in (~left_out, left_out))
        self.emptied += int(((choice == 0) & (lost > 0)).sum())

    def merge(self, other: LeftOutCounts) -> None:
        """Take in what another one counted."""
        self.first, self.least_stable = self.first + other.first, self.least_stable + other.least_stable
        self.harmful, self.emptied = self.harmful + other.harmful, self.emptied + other.emptied

    def as_json(self, border: float | None) -> dict[str, Any]:
        """``border``: of mask.least_stable."""
        return {
            "first": self.first,
            "least_stable": self.least_stable,
            "harmful": self.harmful,
            "stability_below": border,
            "examples_without_choice": self.emptied,
        }

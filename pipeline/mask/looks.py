"""What the passes over all rows are asked for: readers of one quantity each, of every mask that is made together.

A pass may go over the parts in pieces, by several workers: a blank copy of a reader counts each piece, and what the copies
have counted is added up. Nothing that is added depends on the order, so that the bytes are the same for any pieces.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.mask.valuing import Valuing
from alphatoken.pipeline.maths.exact_sum import ExactSum
from alphatoken.pipeline.maths.group_select import TokenGroups
from alphatoken.pipeline.maths.masking import Floats, SparseCounts

ROWS = "rows"  # a reader that looks at the rows themselves and at no values
RANKED, STABILITY = "ranked", "stability"  # methods of Valuing


class Reader(Protocol):
    """Finds one thing in ``passes`` passes over all rows."""

    @property
    def passes(self) -> int:
        """How often it has to see all rows."""

    @property
    def key(self) -> Hashable:
        """Readers of one key that see the same values count the same in the present pass; None: no other does."""

    def blank(self) -> Reader:
        """A copy that has counted nothing yet in the present pass."""

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Take in some rows of the present pass."""

    def counted(self) -> Any:
        """What was counted in the present pass, small enough to be sent."""

    def add(self, counted: Any) -> None:
        """Take in what a blank copy has counted."""

    def next(self) -> None:
        """End the present pass."""


@dataclass(frozen=True, slots=True)
class Look:
    """One pass of a reader, over one branch of the data. ``which``: ranked | stability, of ``valuing``, or rows.

    ``title``: for the display. ``columns``: what it has to read. ``value_key``: the same where the values are.
    """

    title: str
    branch: str
    valuing: Valuing
    which: str
    reader: Reader
    columns: tuple[str, ...]
    value_key: str

    @property
    def key(self) -> Hashable:
        """Looks of one key find the same; None: no other does."""
        return None if self.reader.key is None else (self.branch, self.which, self.value_key, self.reader.key)

    def blank(self) -> Look:
        """With a blank reader."""
        return replace(self, reader=self.reader.blank())

    def at(self, rows: PairedRows) -> None:
        """Show the reader some rows."""
        if self.which == ROWS:
            self.reader.see(rows, np.zeros(0, np.float32))
        else:
            of = getattr(self.valuing, self.which)
            self.reader.see(rows, rows.made((self.which, self.value_key), lambda: of(rows)))


class Squares:
    """mask.normalize=rms: the sums of squares of some terms of ``valuing``, over all response tokens."""

    passes = 1

    def __init__(self, valuing: Valuing, names: Sequence[str]) -> None:
        self.valuing, self.tokens = valuing, 0
        self.sums = {name: ExactSum() for name in names}

    @property
    def key(self) -> Hashable:
        """The terms are told apart by what the values are of."""
        return "squares", tuple(self.sums)

    def blank(self) -> Squares:
        """As of a Reader."""
        return Squares(self.valuing, list(self.sums))

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Add up."""
        for name, total in self.sums.items():
            term = self.valuing.term(rows, name)
            total.add((term * term).sum())
        self.tokens += int(rows.offsets[-1])

    def counted(self) -> tuple[int, dict[str, ExactSum]]:
        """As of a Reader."""
        return self.tokens, self.sums

    def add(self, counted: tuple[int, dict[str, ExactSum]]) -> None:
        """As of a Reader."""
        self.tokens += counted[0]
        for name, total in counted[1].items():
            self.sums[name].merge(total)

    def next(self) -> None:
        """There is one pass."""


class Occurrences:
    """mask.scope=token_id: how often each id occurs among the response tokens."""

    passes = 1

    def __init__(self) -> None:
        self.groups = TokenGroups()

    @property
    def key(self) -> Hashable:
        """The ids are the same for all masks."""
        return "occurrences"

    def blank(self) -> Occurrences:
        """As of a Reader."""
        return Occurrences()

    def see(self, rows: PairedRows, values: Floats) -> None:
        """Count."""
        self.groups.count(rows.response_ids())

    def counted(self) -> SparseCounts:
        """As of a Reader."""
        return self.groups.counted()

    def add(self, counted: SparseCounts) -> None:
        """As of a Reader."""
        self.groups.add(counted)

    def next(self) -> None:
        """There is one pass."""

"""Which rows are shown: of all rows the first few by some number, held while the rows go by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.maths.masking import Bools
from alphatoken.pipeline.report.content import RowContent, Window, content_of
from alphatoken.pipeline.report.reading import Batch


class Choice:
    """The ``size`` rows with the highest number; of equal ones those that come first. ``title``: for people.

    ``mask``: the number of the mask that it speaks of, None for all. ``eligible``: rows that it was made from.
    """

    def __init__(self, kind: str, title: str, size: int, mask: int | None = None) -> None:
        self.kind, self.title, self.size, self.mask = kind, title, size, mask
        self.eligible = 0
        self.numbers, self.rows = np.zeros(0, np.float64), np.zeros(0, np.int64)

    def offer(self, numbers: npt.NDArray[np.float64], among: Bools, first: int) -> None:
        """``numbers``: ``(rows,)`` of consecutive rows from ``first`` on; ``among``: which of them may be chosen."""
        self.eligible += int(among.sum())
        least = self.numbers[-1] if len(self.numbers) == self.size else -np.inf
        better = np.flatnonzero(among & (numbers > least))
        if not len(better):
            return
        both = np.concatenate([self.numbers, numbers[better]])
        rows = np.concatenate([self.rows, better + first])
        order = np.lexsort((rows, -both))[: self.size]
        self.numbers, self.rows = both[order], rows[order]


class Chosen:
    """The content of the rows that some choices hold at present."""

    def __init__(self, choices: Sequence[Choice], window: Window) -> None:
        self.choices, self.window = tuple(choices), window
        self.contents: dict[int, RowContent] = {}

    def take(self, batch: Batch) -> None:
        """After the choices were offered the rows of ``batch``."""
        wanted = {int(row) for choice in self.choices for row in choice.rows}
        for row in wanted - self.contents.keys():
            self.contents[row] = content_of(batch, row - batch.first, self.window)
        for row in self.contents.keys() - wanted:
            del self.contents[row]

    def in_turn(self) -> list[int]:
        """Rows by number, each once: the first of every choice, then the second of every choice, ..."""
        longest = max((len(choice.rows) for choice in self.choices), default=0)
        found = [int(c.rows[place]) for place in range(longest) for c in self.choices if place < len(c.rows)]
        return list(dict.fromkeys(found))


def drawn(batch: Batch) -> npt.NDArray[np.float64]:
    """One number between 0 and 1 per row, the same for the same rows of a run."""
    return np.random.default_rng(batch.first).random(len(batch))

"""Finding rows for the terminal: by id, by a score, by what a mask does to them, by where two masks differ."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.maths.masking import sums_by_row
from alphatoken.pipeline.report.affected import only_always
from alphatoken.pipeline.report.choice import Choice, Chosen
from alphatoken.pipeline.report.content import RowContent, Window, content_of
from alphatoken.pipeline.report.reading import Batch, Reading, lengths_of
from alphatoken.pipeline.report.tally import kept_by_row
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.progress import Progress

WORTH_SHOWING = 20_000  # rows; progress over fewer is not worth a line
AFFECTED, DROPPED, KEPT = "affected", "dropped", "kept"  # beside the scores
Numbers = Callable[[Batch], npt.NDArray[np.float64]]


def by_id(reading: Reading, ids: Collection[str], window: Window) -> list[RowContent]:
    """The rows with these ids, in the order of the data; a number that is no id is that of a row, as rows are shown with.

    Raises RunFailed for ids that no row has.
    """
    missing, some, found = set(ids), list[str](), list[RowContent]()
    one = next(iter(reading.parts.values()))
    for part in reading.rows:
        there: set[str] = set()
        for table in one.tables(f"prepared/{part}", one.prepared, ["id"], "prepare"):
            names = table["id"].to_pylist()
            some = some or names[:3]
            there |= missing.intersection(names)
        if there:
            for batch in reading.part(part, _first(reading, part)):
                names = batch.branches[0].rows.ids.to_pylist()
                found += [content_of(batch, index, window) for index, name in enumerate(names) if name in there]
        missing -= there
        if not missing:
            break
    numbers = {name: int(name) for name in missing if name.isdecimal() and int(name) < reading.total}
    found += _by_number(reading, set(numbers.values()) - {row.number for row in found}, window)
    missing -= numbers.keys()
    if missing:
        raise RunFailed(
            f"no row has the id {', '.join(sorted(missing))}; ids here are like {', '.join(some)}, numbers of rows 0 to "
            f"{reading.total - 1}"
        )
    return sorted(found, key=lambda row: row.number)


def _by_number(reading: Reading, numbers: Collection[int], window: Window) -> list[RowContent]:
    found = []
    for part, rows in reading.rows.items():
        first = _first(reading, part)
        if any(first <= number < first + rows for number in numbers):
            for batch in reading.part(part, first):
                own = range(batch.first, batch.first + len(batch))
                found += [content_of(batch, number - batch.first, window) for number in numbers if number in own]
    return found


def top(reading: Reading, by: str, count: int, window: Window, progress: Progress) -> tuple[list[RowContent], int]:
    """The ``count`` rows with the highest number, highest first, and of how many; ``by``: of ``ways``."""
    return _highest(reading, _number(by), count, window, progress)


def changed(reading: Reading, count: int, window: Window, progress: Progress) -> tuple[list[RowContent], int]:
    """Rows in which most tokens are decided differently by the first two masks, and how many have any."""

    def number(batch: Batch) -> npt.NDArray[np.float64]:
        each = [sums_by_row(one.kept[0] != one.kept[1], one.rows.offsets) for one in batch.branches]
        tokens = np.sum(each, axis=0).astype(np.float64)
        return np.where(tokens > 0, tokens, -np.inf)

    return _highest(reading, number, count, window, progress)


def ways(reading: Reading) -> list[str]:
    """What rows can be ordered by: their affectedness, shares of the first mask, means of scores."""
    return [AFFECTED, DROPPED, KEPT, *reading.scores]


def _highest(
    reading: Reading, number: Numbers, count: int, window: Window, progress: Progress
) -> tuple[list[RowContent], int]:
    """Rows whose number is minus infinity are not among them."""
    choice = Choice("top", "", count)
    chosen = Chosen([choice], window)
    worth = reading.total > WORTH_SHOWING
    with progress.task("inspect", reading.total, "rows") if worth else nullcontext() as task:
        for batch in reading.all():
            numbers = number(batch)
            choice.offer(numbers, np.isfinite(numbers), batch.first)
            chosen.take(batch)
            if task:
                task.advance(len(batch))
    return [chosen.contents[row] for row in chosen.in_turn()], choice.eligible


def _number(by: str) -> Numbers:
    """Per row, minus infinity where it has no response token."""

    def number(batch: Batch) -> npt.NDArray[np.float64]:
        tokens = np.sum([lengths_of(one.rows) for one in batch.branches], axis=0)
        if by in (AFFECTED, DROPPED, KEPT):
            share = np.sum([kept_by_row(one)[0] for one in batch.branches], axis=0) / np.maximum(tokens, 1)
            found = share if by == KEPT else 1 - share
            found = found + only_always(batch, 0) if by == AFFECTED else found
        else:
            sums = [sums_by_row(one.scores[by].astype(np.float64), one.rows.offsets) for one in batch.branches]
            found = np.sum(sums, axis=0) / np.maximum(tokens, 1)
        return np.where(tokens > 0, found, -np.inf)

    return number


def _first(reading: Reading, part: str) -> int:
    """The number of the first row of a part."""
    names = list(reading.rows)
    return sum(reading.rows[name] for name in names[: names.index(part)])

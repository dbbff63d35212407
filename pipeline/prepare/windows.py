"""Documents longer than data.max_length, split into windows that overlap (data.long=split).

Window k begins ``limit - overlap`` tokens after window k - 1. Every token of the document is learned in the last window
that has a token before it: the overlap belongs to the later window, where what follows it is read as well. Its labels are
-100 in the earlier one, so that no token is learned twice; there it is what follows the window's own last tokens, whose
values look ahead (`with_what_follows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from alphatoken.pipeline.prepare.outcome import IGNORED

if TYPE_CHECKING:
    from alphatoken.pipeline.maths.batch import Sequences  # with torch, which workers of prepare do without

LATER_WINDOW = r"#([2-9]|[1-9][0-9]+)$"  # of `window_id`, but the first


@dataclass(frozen=True, slots=True)
class Window:
    """``number``: from 1 on, of all windows of the document. ``labels``: -100 at index 0, and where the next window learns."""

    number: int
    input_ids: list[int]
    labels: list[int]


def windows(ids: Sequence[int], labels: Sequence[int], limit: int, overlap: int) -> list[Window]:
    """The windows of a document of more than ``limit`` tokens, those without a response token among them.

    ``overlap``: tokens that a window shares with the next, from 1 to half of ``limit``; raises ValueError else. The last
    window may be shorter, and has more than ``overlap`` tokens.
    """
    if not 1 <= overlap <= limit // 2:
        raise ValueError(f"an overlap of {overlap} tokens: must be from 1 to half of a window of {limit}")
    step, found = limit - overlap, list[Window]()
    for number, start in enumerate(range(0, len(ids) - overlap, step), 1):
        own = list(labels[start : start + limit])
        own[0] = IGNORED  # nothing before it: learned in the window before
        if start + limit < len(ids):
            own[step + 1 :] = [IGNORED] * (limit - step - 1)
        found.append(Window(number, list(ids[start : start + limit]), own))
    return found


def window_id(row: str, number: int) -> str:
    """The id of a window of a row."""
    return f"{row}#{number}"


def with_what_follows(sequences: Sequences, overlap: int) -> tuple[Sequences, list[int]]:
    """Windows with the labels of the overlap, and how many tokens from each one's right are another window's own.

    ``sequences``: of one part of prepared/, in which windows of a row stand in order. For values: how a token acts on the
    response tokens that follow it is seen through their losses.
    """
    labels, borrowed = list(sequences.labels), [0] * len(sequences)
    for row in range(len(sequences) - 1):
        ids, following = sequences.input_ids[row], sequences.input_ids[row + 1]
        if _follows(sequences.ids[row], sequences.ids[row + 1]) and ids[-overlap:] == following[:overlap]:
            own = sequences.labels[row]
            labels[row] = [*own[: len(own) - overlap + 1], *sequences.labels[row + 1][1:overlap]]
            borrowed[row] = overlap - 1
    return replace(sequences, labels=labels), borrowed


def _follows(earlier: str, later: str) -> bool:
    row, mark, number = earlier.rpartition("#")
    return bool(mark) and number.isdecimal() and later == window_id(row, int(number) + 1)


def of_long_rows(counts: Mapping[str, int]) -> str:
    """What became of rows that are too long, for a line of words; ``counts``: of the stage."""
    cut = f"{counts.get('truncated', 0):,} truncated"
    if not counts.get("windows"):
        return cut
    rows, empty = counts["split_rows"], counts.get("windows_left_out", 0)
    beside = f" (and {empty:,} without a response token, left out)" if empty else ""
    return f"{rows:,} row{'s' * (rows != 1)} split into {counts['windows']:,} windows{beside}, {cut}"

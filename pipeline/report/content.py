"""One row as it is shown: its tokens, their scores, and what every mask keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.mask.worker import LOWEST
from alphatoken.pipeline.maths.masking import Bools, Floats, threshold_of
from alphatoken.pipeline.report.reading import Batch, BranchRows
from alphatoken.pipeline.report.shown_masks import ShownMask

WHOLE = 1 << 40


@dataclass(frozen=True, slots=True)
class BranchContent:
    """The tokens from ``before`` on, ``after`` of them left out at the end; all lists speak of these.

    ``input_ids``, ``response``: ``(tokens,)``; ``scores`` and one ``kept`` per mask: ``(response tokens,)``. ``of``:
    response tokens of the whole row; ``kept_of``: how many of them each mask keeps. ``thresholds``: per mask, None where
    the row has none of its own.
    """

    input_ids: npt.NDArray[np.int32]
    response: Bools
    scores: dict[str, Floats]
    kept: tuple[Bools, ...]
    before: int
    after: int
    of: int
    kept_of: tuple[int, ...]
    thresholds: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class RowContent:
    """``number``: counted over the run, from 0. ``source``: the file and the row in it. ``branches``: one, or of a pair two.

    ``only``: per mask, whether it keeps nothing of the whole row but tokens that are always kept.
    """

    number: int
    id: str
    source: str
    branches: tuple[BranchContent, ...]
    only: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """How much of a row is shown: tokens before its first response token, and from there on."""

    before: int = WHOLE
    after: int = WHOLE


def content_of(batch: Batch, index: int, window: Window) -> RowContent:
    """Row ``index`` of a batch, copied, so that the batch can be forgotten."""
    only = [True] * len(batch.masks)
    for found in batch.branches:
        start, stop = found.rows.token_offsets()[index : index + 2]
        own = slice(*found.rows.offsets[index : index + 2])
        ids = _ids(found.rows)[start:stop][found.rows.response[start:stop]]
        for number, mask in enumerate(batch.masks):
            only[number] &= not bool((found.kept[number][own] & ~np.isin(ids, mask.always)).any())
    ids = batch.branches[0].rows.ids
    return RowContent(
        batch.first + index, ids[index].as_py(), batch.sources[index].as_py(),
        tuple(_branch(found, index, window, batch.masks) for found in batch.branches), tuple(only),
    )  # fmt: skip


def _branch(found: BranchRows, index: int, window: Window, masks: Sequence[ShownMask]) -> BranchContent:
    rows = found.rows
    start, stop = (int(place) for place in rows.token_offsets()[index : index + 2])
    begin, end = (int(place) for place in rows.offsets[index : index + 2])
    response = rows.response[start:stop]
    first = int(response.argmax()) if response.any() else stop - start
    shown = slice(max(0, first - window.before), min(stop - start, first + window.after))
    own = slice(begin, begin + int(response[shown].sum()))  # no response token stands before what is shown
    return BranchContent(
        input_ids=_ids(rows)[start:stop][shown].copy(),
        response=response[shown].copy(),
        scores={name: score[own].copy() for name, score in found.scores.items()},
        kept=tuple(kept[own].copy() for kept in found.kept),
        before=shown.start,
        after=stop - start - shown.stop,
        of=end - begin,
        kept_of=tuple(int(kept[begin:end].sum()) for kept in found.kept),
        thresholds=tuple(_threshold(found, index, number, mask) for number, mask in enumerate(masks)),
    )


def _ids(rows: PairedRows) -> npt.NDArray[np.int32]:
    """Of all tokens; no copy."""
    assert rows.input_ids is not None
    found: npt.NDArray[np.int32] = rows.input_ids.flatten().to_numpy()
    return found


def _threshold(found: BranchRows, index: int, number: int, mask: ShownMask) -> float | None:
    """Of the group of examples that example ``index`` was compared in."""
    ranked = found.ranked[number]
    if ranked is None or mask.grouped is None:
        return None
    first = index - index % mask.grouped
    start, stop = found.rows.offsets[[first, min(first + mask.grouped, len(found.rows))]]
    if start == stop:
        return None
    return float(max(threshold_of(ranked[start:stop], mask.settings["rho"]), LOWEST))

"""Rows as JSON that the page's script reads: small enough that hundreds fit, exact to three digits."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.maths.masking import Bools, Floats
from alphatoken.pipeline.report.content import BranchContent, RowContent
from alphatoken.pipeline.report.texts import Texts, in_a_line, visible

LONGEST_NAME = 200  # characters of an id or a source


class RowPayload:
    """Makes JSON of rows; ``scores``: the names in the order in which their numbers are written."""

    def __init__(self, scores: Sequence[str], texts: Texts) -> None:
        self.scores, self.texts = tuple(scores), texts

    def row(self, row: RowContent, why: Sequence[int]) -> dict[str, Any]:
        """``why``: numbers of the choices that it is in."""
        return {
            "n": row.number,
            "id": clipped(row.id),
            "from": clipped(row.source),
            "why": list(why),
            "only": [int(one) for one in row.only],
            "b": [self._branch(branch) for branch in row.branches],
        }

    def texts_of(self, rows: Sequence[dict[str, Any]]) -> dict[int, str]:
        """Token id -> text, of every token in ``rows``."""
        ids = {token for row in rows for branch in row["b"] for token in branch["t"]}
        return {token: visible(self.texts.one(token)) for token in sorted(ids)}

    def _branch(self, branch: BranchContent) -> dict[str, Any]:
        ids = branch.input_ids.tolist()
        return {
            "t": ids,
            "o": {place: visible(text) for place, text in self.texts.joined(ids).items()},
            "r": bits(branch.response),
            "before": branch.before,
            "after": branch.after,
            "of": branch.of,
            "kept": list(branch.kept_of),
            "k": [bits(kept) for kept in branch.kept],
            "th": [None if one is None else rounded(one)[0] for one in branch.thresholds],
            "s": [numbers(branch.scores[name]) for name in self.scores],
        }


def bits(flags: Bools) -> str:
    """Eight flags a byte, the first in the highest bit, as base64."""
    return base64.b64encode(np.packbits(flags).tobytes()).decode()


def numbers(values: Floats) -> list[Any]:
    """``[scale, base64 of little-endian float16]``, to be multiplied: three digits over nine powers of ten."""
    most = float(np.abs(values).max(initial=0.0))
    scale = 2.0 ** (np.ceil(np.log2(most)) - 15) if most > 0 else 1.0
    halves = (values.astype(np.float64) / scale).astype("<f2")
    return [scale, base64.b64encode(halves.tobytes()).decode()]


def rounded(values: npt.ArrayLike) -> list[float]:
    """To five digits."""
    return [float(f"{value:.5g}") for value in np.asarray(values, np.float64).ravel().tolist()]


def clipped(text: str) -> str:
    """At most LONGEST_NAME characters, on one line."""
    short = text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"
    return in_a_line(short)


def as_script(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

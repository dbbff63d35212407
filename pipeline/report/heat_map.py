"""Token heat maps: a few examples whose response tokens carry their value as a colour, and whether they are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PROMPT_TOKENS, RESPONSE_TOKENS = 80, 400  # shown of an example


@dataclass(frozen=True, slots=True)
class ShownToken:
    """``strength``: -1 .. 1, the value clipped at twice its root mean square; None for a prompt token."""

    text: str
    strength: float | None
    kept: bool
    details: str


@dataclass(frozen=True, slots=True)
class HeatMap:
    """One example. ``before``, ``after``: tokens that are not shown on either side."""

    title: str
    tokens: tuple[ShownToken, ...]
    before: int
    after: int
    kept: int
    response: int


def heat_map(
    title: str,
    input_ids: list[int],
    labels: list[int],
    kept: npt.NDArray[np.bool_],
    columns: Mapping[str, npt.NDArray[Any]],
    scale: float,
    decode: Callable[[int], str],
    ignored: int = -100,
) -> HeatMap:
    """``columns``: name -> (length,), ``value`` among them; ``scale``: the root mean square of ``value``."""
    response = np.array(labels) != ignored
    first = int(response.argmax()) if response.any() else len(labels)
    start, stop = max(0, first - PROMPT_TOKENS), min(len(labels), first + RESPONSE_TOKENS)
    tokens = []
    for index in range(start, stop):
        strength, details = None, "prompt"
        if response[index]:
            strength = float(np.clip(columns["value"][index] / (2 * scale), -1, 1)) if scale else 0.0
            named = [f"{name.replace('_', ' ')} {column[index]:+.3g}" for name, column in columns.items()]
            details = "\n".join(["kept" if kept[index] else "masked", *named])
        tokens.append(ShownToken(_visible(decode(input_ids[index])), strength, bool(kept[index]), details))
    return HeatMap(
        title, tuple(tokens), start, len(labels) - stop, int((kept & response).sum()), int(response.sum())
    )  # fmt: skip


def _visible(text: str) -> str:
    """A token's text with its line breaks to be seen."""
    return text.replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "→   ") or "∅"

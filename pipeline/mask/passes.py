"""What is found in passes over all rows before anything is written; each pass builds on the ones before.

The threshold over the data set is exact: a radix selection in two passes over the values; in four or eight with
mask.scope=token_id, in more with mask.rule=weight. Before, mask.normalize=rms and token_id take one pass each and
mask.least_stable two. Masks that are made together go over the rows together: what is here is one mask's side of it, a
generator that hands out what it wants to look at and goes on when that has seen every row.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from alphatoken.data_schemas import KEPT
from alphatoken.pipeline.mask.left_out import LeastStable
from alphatoken.pipeline.mask.looks import RANKED, ROWS, STABILITY, Look, Occurrences, Reader, Squares
from alphatoken.pipeline.mask.rehearsed import Decided
from alphatoken.pipeline.mask.soft_weights import WeightsOverDataSet, WeightsWithin
from alphatoken.pipeline.mask.thresholds import (
    KEEP_ALL,
    KEEP_POSITIVE,
    Fixed,
    OverDataSet,
    PerTokenId,
    Threshold,
    Within,
    some_tokens,
)
from alphatoken.pipeline.mask.valuing import Valuing
from alphatoken.pipeline.maths.group_select import TokenGroups
from alphatoken.pipeline.maths.masking import RANDOM
from alphatoken.pipeline.settings import MaskSettings


@dataclass(frozen=True, slots=True)
class Asking:
    """One mask's side of the passes over one branch of the data; ``settings``: resolved."""

    branch: str
    settings: MaskSettings
    rehearsed: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """What the passes read."""
        found = list(self.settings.columns())
        if self.settings.score == "random":
            found.append(RANDOM)
        return (*found, *([KEPT] if self.rehearsed else []))


# Hands out the looks of one pass, goes on when they have seen every row, and returns what it ends with.
Steps = Generator[list[Look], None, "Found"]


@dataclass(frozen=True, slots=True)
class Found:
    """What the passes have found: how rows are decided.

    ``threshold``: of the values; ``alone``: if stability had no say. ``soft``: mask.rule=weight. ``groups``: of
    mask.scope=token_id, or one group of all. ``zeros``: terms that are zero for every token.
    """

    valuing: Valuing
    threshold: Threshold
    alone: Threshold
    soft: WeightsOverDataSet | WeightsWithin | None
    groups: TokenGroups | None
    zeros: tuple[str, ...]


def look(asking: Asking) -> Steps:
    """All passes that the settings need, in order."""
    settings = asking.settings
    valuing, zeros = yield from find_scales(asking, Valuing(settings, {}))
    groups = yield from find_groups(asking, valuing)
    valuing = yield from find_least_stable(asking, valuing)
    soft = yield from find_weights(asking, valuing, groups)
    threshold, alone = yield from find_thresholds(asking, valuing, groups)
    return Found(valuing, threshold, alone, soft, groups, zeros)


def _feed(
    asking: Asking, title: str, which: str, readers: Sequence[tuple[Valuing, Reader]]
) -> Generator[list[Look], None, None]:
    """Show every row to the readers as often as they want to see them, which is equally often."""
    for _ in range(readers[0][1].passes):
        yield [Look(title, asking.branch, own, which, one, asking.columns, own.key) for own, one in readers]
        for _, reader in readers:
            reader.next()


def find_scales(asking: Asking, valuing: Valuing) -> Generator[list[Look], None, tuple[Valuing, tuple[str, ...]]]:
    """mask.normalize=rms: the root mean square of every term that is weighed; else 1. And the terms that are zero."""
    settings = valuing.settings
    weighed = {
        **(valuing.objectives or {"score": 1.0}),
        "stability": settings.stability_weight,
        "loss": settings.loss_weight,
    }
    scales = {name: 1.0 for name, weight in weighed.items() if weight}
    if settings.normalize != "rms" or settings.score == "full":
        return replace(valuing, scales=scales), ()
    squares = Squares(valuing, list(scales))
    yield from _feed(asking, "scales", ROWS, [(valuing, squares)])
    tokens, sums = some_tokens(squares.tokens), {name: float(total) for name, total in squares.sums.items()}
    found = {name: float(np.sqrt(square / tokens)) if square else 1.0 for name, square in sums.items()}
    return replace(valuing, scales=found), tuple(name for name, square in sums.items() if not square)


def find_groups(asking: Asking, valuing: Valuing) -> Generator[list[Look], None, TokenGroups | None]:
    """mask.scope=token_id: how often each id occurs; soft weights over the data set: one group of all."""
    settings = asking.settings
    by_id = settings.scope == "token_id" and settings.rule != "positive"
    all_in_one = settings.scope == "dataset" and settings.rule == "weight"
    if settings.score == "full" or not (by_id or all_in_one):
        return None
    found = Occurrences()
    yield from _feed(asking, "groups", ROWS, [(valuing, found)])
    found.groups.close(settings.rare_tokens if by_id else math.inf)
    some_tokens(int(found.groups.sizes.sum()))
    return found.groups


def find_least_stable(asking: Asking, valuing: Valuing) -> Generator[list[Look], None, Valuing]:
    """mask.least_stable: below which stability tokens are left out."""
    if not valuing.settings.least_stable:
        return valuing
    reader = LeastStable(valuing.settings.least_stable)
    yield from _feed(asking, "least stable", STABILITY, [(valuing, reader)])
    return replace(valuing, border=reader.border)


def find_weights(
    asking: Asking, valuing: Valuing, groups: TokenGroups | None
) -> Generator[list[Look], None, WeightsOverDataSet | WeightsWithin | None]:
    """mask.rule=weight: the soft weights."""
    settings = valuing.settings
    if settings.rule != "weight" or settings.score == "full":
        return None
    if groups is None:
        return WeightsWithin(settings.rho, _size(settings))
    soft = WeightsOverDataSet(settings.rho, groups)
    yield from _feed(asking, "weights", RANKED, [(valuing, soft)])
    return soft


def find_thresholds(
    asking: Asking, valuing: Valuing, groups: TokenGroups | None
) -> Generator[list[Look], None, tuple[Threshold, Threshold]]:
    """With and without stability."""
    found = tuple(_threshold(valuing.settings, groups, asking.rehearsed) for _ in range(2))
    one, other = found
    if isinstance(one, OverDataSet | PerTokenId) and isinstance(other, OverDataSet | PerTokenId):
        yield from _feed(asking, "threshold", RANKED, [(valuing, one), (valuing.without_stability(), other)])
    return one, other


def _threshold(settings: MaskSettings, groups: TokenGroups | None, rehearsed: bool) -> Threshold:
    if rehearsed:
        return Decided()
    if settings.score == "full" or settings.rule == "weight":
        return Fixed(KEEP_ALL)
    if settings.rule == "positive":
        return Fixed(KEEP_POSITIVE)
    if settings.scope == "dataset":
        return OverDataSet(settings.rho)
    return PerTokenId(settings.rho, groups) if groups else Within(settings.rho, _size(settings))


def _size(settings: MaskSettings) -> int:
    """Consecutive examples of a group."""
    return settings.batch_size if settings.scope == "batch" else 1

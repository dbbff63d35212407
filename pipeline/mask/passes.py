"""Passes over all rows before anything is written; each finds one thing and builds on the ones before.

The threshold over the data set is exact: a radix selection in two passes over the values; in four or eight with
mask.scope=token_id, in more with mask.rule=weight. Before, mask.normalize=rms and token_id take one pass each and
mask.least_stable two. The same rows are read each time; nothing is held but counts, per token id at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alphatoken.data_schemas import KEPT
from alphatoken.pipeline.mask.left_out import LeastStable
from alphatoken.pipeline.mask.paired_rows import PairedParts, PairedRows
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
from alphatoken.pipeline.maths.masking import RANDOM, Floats
from alphatoken.pipeline.run.progress import Progress, Task
from alphatoken.pipeline.settings import MaskSettings


@dataclass(frozen=True, slots=True)
class Passes:
    """The rows of a run, of pairs one branch of them, to be gone over again and again.

    ``columns``: what the passes read. ``title``: for the display.
    """

    parts: PairedParts
    columns: tuple[str, ...]
    progress: Progress
    title: str

    @contextmanager
    def task(self, name: str) -> Iterator[Task]:
        """Show how far all rows are."""
        with self.progress.task(f"{self.title}: {name}", sum(self.parts.rows.values()), "rows") as task:
            yield task

    def rows(self, name: str) -> Iterator[PairedRows]:
        """Every row once."""
        with self.task(name) as task:
            for rows in self.parts.all(self.columns):
                yield rows
                task.advance(len(rows))

    def feed(self, name: str, readers: Sequence[tuple[Callable[[PairedRows], Floats], Any]]) -> None:
        """Show every row as often as the readers, (what of the rows, reader) each, want to see them."""
        passes = readers[0][1].passes
        if not passes:
            return
        with self.task(name) as task:
            seen = 0  # each row as often as there are passes
            for _ in range(passes):
                for rows in self.parts.all(self.columns):
                    for values_of, reader in readers:
                        reader.see(rows, values_of(rows))
                    seen += len(rows)
                    task.at(seen // passes)
                for _, reader in readers:
                    reader.next()


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


def columns_of(settings: MaskSettings, rehearsed: bool) -> tuple[str, ...]:
    """What the passes read; of resolved settings."""
    found = list(settings.columns())
    if settings.score == "random":
        found.append(RANDOM)
    return (*found, *([KEPT] if rehearsed else []))


def look(passes: Passes, settings: MaskSettings, rehearsed: bool) -> Found:
    """All passes that ``settings`` need, in order."""
    valuing, zeros = find_scales(passes, Valuing(settings, {}))
    groups = find_groups(passes, settings)
    valuing = find_least_stable(passes, valuing)
    soft = find_weights(passes, valuing, groups)
    threshold, alone = find_thresholds(passes, valuing, groups, rehearsed)
    return Found(valuing, threshold, alone, soft, groups, zeros)


def find_scales(passes: Passes, valuing: Valuing) -> tuple[Valuing, tuple[str, ...]]:
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
    tokens, squares = 0, dict.fromkeys(scales, 0.0)
    for rows in passes.rows("scales"):
        for name in scales:
            squares[name] += float(np.square(valuing.term(rows, name)).sum())
        tokens += int(rows.offsets[-1])
    some_tokens(tokens)
    found = {name: float(np.sqrt(square / tokens)) if square else 1.0 for name, square in squares.items()}
    return replace(valuing, scales=found), tuple(name for name, square in squares.items() if not square)


def find_groups(passes: Passes, settings: MaskSettings) -> TokenGroups | None:
    """mask.scope=token_id: how often each id occurs; soft weights over the data set: one group of all."""
    by_id = settings.scope == "token_id" and settings.rule != "positive"
    all_in_one = settings.scope == "dataset" and settings.rule == "weight"
    if settings.score == "full" or not (by_id or all_in_one):
        return None
    groups = TokenGroups()
    for rows in passes.rows("groups"):
        groups.count(rows.response_ids())
    groups.close(settings.rare_tokens if by_id else math.inf)
    some_tokens(int(groups.sizes.sum()))
    return groups


def find_least_stable(passes: Passes, valuing: Valuing) -> Valuing:
    """mask.least_stable: below which stability tokens are left out."""
    if not valuing.settings.least_stable:
        return valuing
    reader = LeastStable(valuing.settings.least_stable)
    passes.feed("least stable", [(valuing.stability, reader)])
    return replace(valuing, border=reader.border)


def find_weights(
    passes: Passes, valuing: Valuing, groups: TokenGroups | None
) -> WeightsOverDataSet | WeightsWithin | None:
    """mask.rule=weight: the soft weights."""
    settings = valuing.settings
    if settings.rule != "weight" or settings.score == "full":
        return None
    soft: WeightsOverDataSet | WeightsWithin
    soft = WeightsOverDataSet(settings.rho, groups) if groups else WeightsWithin(settings.rho, _size(settings))
    passes.feed("weights", [(valuing.ranked, soft)])
    return soft


def find_thresholds(
    passes: Passes, valuing: Valuing, groups: TokenGroups | None, rehearsed: bool
) -> tuple[Threshold, Threshold]:
    """With and without stability."""
    found = tuple(_threshold(valuing.settings, groups, rehearsed) for _ in range(2))
    passes.feed("threshold", list(zip((valuing.ranked, valuing.alone), found, strict=True)))
    return found[0], found[1]


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

"""Adaptation against retention, one dot per candidate of a trial with whiskers over seeds, as coordinates of a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, MARGIN = 640, 340, 14
LETTER, LINE = 6.6, 14  # pixels of a label of 12 px: the mean width of a letter, and from one label to the next
ASIDE, FURTHEST = 8, 20  # pixels between a dot and its label; lines that a label may stand away from its dot
DOT = 5  # its radius, with its border


Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Label:
    """Where a name stands: its end (``end``) or its beginning at ``x``, its baseline at ``y``; ``away``: far from its dot."""

    x: float
    y: float
    end: bool
    away: bool


@dataclass(frozen=True, slots=True)
class Dot:
    """A candidate at (x, y), in pixels from the left and from the top; ``dx``, ``dy``: how far its whiskers reach."""

    name: str
    kind: str
    wins: bool
    x: float
    y: float
    dx: float
    dy: float
    title: str
    label: Label


@dataclass(frozen=True, slots=True)
class DotPlot:
    """``dots``, and the range of both axes: loss on held-out rows, divergence from the reference; nats per token."""

    dots: tuple[Dot, ...]
    losses: tuple[float, float]
    divergences: tuple[float, float]


def dot_plot(summary: Mapping[str, Any]) -> DotPlot:
    """Of trial/summary.json. The untouched model is left out: it is far from all that were trained."""
    lines = [line for line in summary["lines"] if line["kind"] != "untouched"]
    losses, divergences = (_range([line[key] for line in lines]) for key in ("adaptation", "retention"))
    drawn = []
    for line in lines:
        (loss, loss_spread), (moved, moved_spread) = line["adaptation"], line["retention"]
        x, dx = _scaled(loss, loss_spread, losses, WIDTH)
        y, dy = _scaled(moved, moved_spread, divergences, HEIGHT)
        title = f"{line['name']}: loss {loss:.4f} ± {loss_spread:.4f}, divergence {moved:.4f} ± {moved_spread:.4f}"
        drawn.append((line, x, HEIGHT - y, dx, dy, title))
    taken: list[Box] = [(x - DOT, y - DOT, x + DOT, y + DOT) for _, x, y, *_ in drawn]
    dots = []
    for line, x, y, dx, dy, title in drawn:
        name, label = line["name"], _placed(line["name"], x, y, taken)
        dots.append(Dot(name, line["kind"], name == summary["winner"], x, y, dx, dy, title, label))
    return DotPlot(tuple(dots), losses, divergences)


def _placed(name: str, x: float, y: float, taken: list[Box]) -> Label:
    """The place nearest to the dot where the label covers none of ``taken``, to which it is added; else beside the dot."""
    width = LETTER * len(name)
    usual = x > 0.7 * WIDTH  # whether it ends at the dot, there being no room on the right
    room = {True: x - ASIDE - width > 0, False: x + ASIDE + width < WIDTH}
    sides = [end for end in (usual, not usual) if room[end]] or [x > WIDTH / 2]
    baselines = [y - 6 + line * LINE for line in sorted(range(-FURTHEST, FURTHEST + 1), key=abs)]
    places = [(baseline, end) for baseline in baselines if 0 < baseline <= HEIGHT for end in sides]
    places = places or [(baselines[0], sides[0])]
    free = (place for place in places if not any(_overlap(_box(x, width, *place), other) for other in taken))
    baseline, end = next(free, places[0])
    taken.append(_box(x, width, baseline, end))
    return Label(x + (-ASIDE if end else ASIDE), baseline, end, baseline != baselines[0])


def _box(x: float, width: float, baseline: float, end: bool) -> Box:
    left = x - ASIDE - width if end else x + ASIDE
    return left, baseline - LINE + 3, left + width, baseline + 3


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _range(pairs: Sequence[Sequence[float]]) -> tuple[float, float]:
    return min(mean - spread for mean, spread in pairs), max(mean + spread for mean, spread in pairs)


def _scaled(mean: float, spread: float, between: tuple[float, float], size: float) -> tuple[float, float]:
    low, high = between
    scale = (size - 2 * MARGIN) / (high - low) if high > low else 0.0
    place = MARGIN + (mean - low) * scale if scale else size / 2
    return place, spread * scale

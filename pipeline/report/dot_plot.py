"""Adaptation against retention, one dot per candidate of a trial with whiskers over seeds, as coordinates of a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, MARGIN = 640, 340, 14


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

    @property
    def left_of_label(self) -> bool:
        """Whether the label stands on the left, where there is no room on the right."""
        return self.x > 0.7 * WIDTH


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
    dots = []
    for line in lines:
        (loss, loss_spread), (moved, moved_spread) = line["adaptation"], line["retention"]
        x, dx = _scaled(loss, loss_spread, losses, WIDTH)
        y, dy = _scaled(moved, moved_spread, divergences, HEIGHT)
        title = f"{line['name']}: loss {loss:.4f} ± {loss_spread:.4f}, divergence {moved:.4f} ± {moved_spread:.4f}"
        dots.append(Dot(line["name"], line["kind"], line["name"] == summary["winner"], x, HEIGHT - y, dx, dy, title))
    return DotPlot(tuple(dots), losses, divergences)


def _range(pairs: Sequence[Sequence[float]]) -> tuple[float, float]:
    return min(mean - spread for mean, spread in pairs), max(mean + spread for mean, spread in pairs)


def _scaled(mean: float, spread: float, between: tuple[float, float], size: float) -> tuple[float, float]:
    low, high = between
    scale = (size - 2 * MARGIN) / (high - low) if high > low else 0.0
    place = MARGIN + (mean - low) * scale if scale else size / 2
    return place, spread * scale

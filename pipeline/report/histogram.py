"""Histograms of streams, and the numbers that an SVG needs to draw them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 360.0, 120.0  # of the drawing area, in SVG units


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar in SVG units, with its interval and its counts for the tooltip."""

    x: float
    y: float
    width: float
    height: float
    kept_height: float
    start: float
    stop: float
    count: int
    kept: int


class Histogram:
    """Counts of values in equal bins between two borders, of kept tokens apart; what lies outside enters the edge bins."""

    def __init__(self, title: str, low: float, high: float, bins: int = 60) -> None:
        self.title = title
        self.edges = np.linspace(low, high, bins + 1)
        self.counts = np.zeros(bins, np.int64)
        self.kept = np.zeros(bins, np.int64)
        self.outside = 0

    def add(self, values: npt.NDArray[Any], kept: npt.NDArray[np.bool_]) -> None:
        """Count ``values``; ``kept``: which of them belong to kept tokens."""
        low, high = self.edges[0], self.edges[-1]
        self.outside += int(((values < low) | (values > high)).sum())
        inside = np.clip(values, low, high)
        self.counts += np.histogram(inside, self.edges)[0]
        self.kept += np.histogram(inside[kept], self.edges)[0]

    @property
    def total(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    @property
    def zero(self) -> float | None:
        """Where 0 lies on the horizontal axis, in SVG units; None outside."""
        low, high = float(self.edges[0]), float(self.edges[-1])
        return WIDTH * -low / (high - low) if low < 0 < high else None

    def bars(self) -> list[Bar]:
        """The bars of bins that hold anything; heights grow with the root of the count, so that tails can be seen."""
        most, step = max(1, int(self.counts.max())), WIDTH / len(self.counts)
        found = []
        for index, (count, kept) in enumerate(zip(self.counts.tolist(), self.kept.tolist(), strict=True)):
            if count:
                height, kept_height = (HEIGHT * (n / most) ** 0.5 for n in (count, kept))
                start, stop = float(self.edges[index]), float(self.edges[index + 1])
                found.append(
                    Bar(index * step, HEIGHT - height, step * 0.9, height, kept_height, start, stop, count, kept)
                )
        return found

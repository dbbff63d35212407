"""Bins of a score: where they stand is found from a sample, so that no axis is wasted on what hardly occurs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.maths.masking import Floats

BINS = 48
TAIL = 0.005  # of the sample's tokens may lie outside on each side; they are counted in the bins at the edges
UNEVEN = 20.0  # a score without a sign gets a logarithmic axis where its upper tail is this many medians high


@dataclass(frozen=True, slots=True)
class Axis:
    """Equal bins from ``low`` to ``high``, of a logarithmic axis in powers of ten."""

    low: float
    high: float
    logarithmic: bool

    def bins(self, values: Floats) -> npt.NDArray[np.int32]:
        """The bin of each value, 0 .. BINS - 1; what lies outside is in the bins at the edges."""
        places = np.log10(np.maximum(values, np.float32(10**self.low))) if self.logarithmic else values
        scale = np.float32(BINS / (self.high - self.low))
        return np.clip((places - np.float32(self.low)) * scale, 0, BINS - 1).astype(np.int32)

    def edges(self) -> list[float]:
        """``BINS + 1`` borders in the score's unit."""
        borders = np.linspace(self.low, self.high, BINS + 1)
        return (10**borders if self.logarithmic else borders).tolist()


def axis_of(sample: Floats) -> Axis | None:
    """For a score of which ``sample`` is a sample; None where there is nothing to see, since all values are the same."""
    if not len(sample) or sample.min() == sample.max():
        return None
    low, high = (float(q) for q in np.quantile(sample.astype(np.float64), [TAIL, 1 - TAIL]))
    if low == high:
        low, high = float(sample.min()), float(sample.max())
    positive = sample[sample > 0]
    if sample.min() >= 0 and len(positive):
        median = float(np.median(positive))
        if high > UNEVEN * median:
            start = float(np.quantile(positive.astype(np.float64), 0.01))
            return Axis(float(np.log10(start)), float(np.log10(high)), True)
        low = 0.0
    return Axis(low, high, False)

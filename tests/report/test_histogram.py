"""Axes of the charts of scores: as wide as what there is to see."""

import numpy as np
import pytest

from alphatoken.pipeline.report.histogram import BINS, axis_of

DRAWN = np.random.default_rng(0)
SAMPLES = {
    "without a sign": DRAWN.random(20_000),
    "without a sign, uneven": DRAWN.exponential(size=20_000) ** 4,
    "mostly above 0": DRAWN.gamma(2.0, size=20_000) - 0.1,
    "mostly below 0": 0.1 - DRAWN.gamma(2.0, size=20_000),
    "with an outlier": np.append(DRAWN.standard_normal(20_000), [-1e6, 1e6]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_no_half_of_an_axis_is_wasted(name):
    """Bins at both ends hold tokens, and so do most of those between."""
    sample = SAMPLES[name].astype(np.float32)
    axis = axis_of(sample)
    assert axis.logarithmic == ("uneven" in name)
    count = np.bincount(axis.bins(sample), minlength=BINS)
    assert len(count) == BINS and (count > 0).sum() > 0.8 * BINS
    assert 0 < count[0] < 0.2 * len(sample) and 0 < count[-1] < 0.2 * len(sample)
    assert axis.edges()[0] == 0 or name != "without a sign"


def test_there_is_no_axis_where_all_values_are_the_same():
    assert axis_of(np.full(9, 0.5, np.float32)) is None and axis_of(np.zeros(0, np.float32)) is None

"""Soft weights against the ramp written out rank by rank."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphatoken.pipeline.maths.group_select import select_in_memory
from alphatoken.pipeline.maths.loss_ramp import STEPS, border_ranks, count_steps, step_weights, steps_of


def weights(values, rho, groups=None):
    groups = np.zeros(len(values), np.int64) if groups is None else groups
    borders = select_in_memory(values, groups, border_ranks(rho, np.bincount(groups)))
    steps, counts = steps_of(values, groups, borders), np.zeros((len(borders), STEPS + 2), np.int64)
    count_steps(steps, groups, counts)
    return step_weights(rho, counts)[groups, steps]


def naive(values, rho):
    """Weight per token, from the mean of the ramp over the ranks of the tokens between two borders (by quadrature)."""
    n, exact = len(values), Fraction(str(rho))
    half = min(exact, 1 - exact)
    ordered = sorted(values, reverse=True)
    borders = [ordered[max(1, math.ceil((exact - half + 2 * half * s / STEPS) * n)) - 1] for s in range(STEPS + 1)]

    def ramp(x):
        if not half:
            return 1.0
        return min(1.0, max(0.0, float((exact + half - Fraction(x) / n) / (2 * half))))

    fine = 64
    by_rank = [sum(ramp(rank + Fraction(2 * i + 1, 2 * fine)) for i in range(fine)) / fine for rank in range(n)]
    step = [sum(v < b for b in borders) for v in ordered]
    mean = {s: np.mean([w for w, t in zip(by_rank, step, strict=True) if t == s]) for s in set(step)}
    return [mean[sum(v < b for b in borders)] for v in values]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-8, 8), min_size=1, max_size=40), st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.95, 1.0]))
def test_weights_are_the_mean_of_the_ramp_over_the_ranks_of_a_step(values, rho):
    found = weights(np.array(values, np.float32), rho)
    # The quadrature bends around the two corners of the ramp only.
    np.testing.assert_allclose(found, naive(values, rho), atol=2e-3)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-10, 10, width=32)), min_size=1, max_size=90),
    st.integers(1, 100),
)
def test_weights_are_in_the_unit_interval_monotone_and_rho_on_average_in_every_group(tokens, percent):
    groups = np.unique([group for group, _ in tokens], return_inverse=True)[1]
    values, rho = np.array([value for _, value in tokens], np.float32), percent / 100
    found = weights(values, rho, groups)
    assert found.dtype == np.float32 and (found >= 0).all() and (found <= 1).all()
    for group in range(groups.max() + 1):
        inside = groups == group
        assert found[inside].mean(dtype=np.float64) == pytest.approx(rho, abs=1e-6)
        order = np.argsort(values[inside], kind="stable")
        assert (np.diff(found[inside][order]) >= 0).all()
        same = np.diff(values[inside][order]) == 0
        assert (np.diff(found[inside][order])[same] == 0).all()


def test_half_falls_over_the_whole_group_and_a_third_ends_before():
    values = np.arange(3200, dtype=np.float32)[::-1].copy()
    place = (np.arange(3200) + 0.5) / 3200
    half, third = weights(values, 0.5), weights(values, 0.3)
    assert np.abs(half - (1 - place)).max() < 1 / STEPS
    assert np.abs(third - np.clip(1 - place / 0.6, 0, 1)).max() < 1 / STEPS
    assert (third[place > 0.61] == 0).all() and len(np.unique(half)) == STEPS + 1
    assert (weights(values, 1.0) == 1).all()
    most = weights(values, 0.9)
    assert (most[place < 0.79] == 1).all() and most[-1] < 0.05


def test_equal_values_all_weigh_rho():
    np.testing.assert_allclose(weights(np.zeros(7, np.float32), 0.3), 0.3, rtol=1e-6)

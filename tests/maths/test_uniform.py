"""mask.score=random: what is drawn for an example depends on the seed and its name alone."""

import subprocess
import sys

import numpy as np
import pytest

from alphatoken.pipeline.maths.uniform import uniform


def test_an_example_keeps_its_numbers_whatever_else_is_drawn():
    alone = uniform(3, "row-2", 50)
    for name in ("row-0", "row-1", "row-3"):
        uniform(3, name, 7)
    np.random.default_rng(0).random(10)
    assert np.array_equal(uniform(3, "row-2", 50), alone)
    assert np.array_equal(uniform(3, "row-2", 20), alone[:20])  # a longer example begins alike


def test_seed_and_name_both_matter():
    drawn = [uniform(seed, name, 40) for seed in (0, 1, 11) for name in ("a", "b", "1/a", "a (chosen)")]
    for index, one in enumerate(drawn):
        assert not any(np.array_equal(one, other) for other in drawn[index + 1 :])


def test_numbers_are_exact_float32_and_the_same_everywhere():
    """24 bits each: no rounding. The first few as they were first drawn, so that masks can be made again."""
    drawn = uniform(0, "row-0", 10_000)
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
    scaled = drawn.astype(np.float64) * 2**24
    assert np.array_equal(scaled, scaled.round())
    assert (scaled % 2).mean() == pytest.approx(0.5, abs=0.03)  # all 24 bits are used
    assert uniform(0, "row-0", 4).tolist() == [
        0.8791399002075195,
        0.8123273253440857,
        0.7354307174682617,
        0.25650233030319214,
    ]
    assert len(uniform(0, "row-0", 0)) == 0


def test_they_are_uniform_and_independent_over_examples():
    drawn = np.stack([uniform(0, name, 4000) for name in "abc"])
    assert len(np.unique(drawn)) > 11_900
    assert np.histogram(drawn, 10, (0, 1))[0] == pytest.approx(1200, abs=150)
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.05


def test_needs_no_torch():
    code = "import alphatoken.pipeline.maths.uniform, sys; assert not {'torch', 'ray', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Order statistics against numpy's sort, and the rule of which tokens are kept."""

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from alphatoken.pipeline.maths.masking import (
    RankSelect,
    keep,
    keep_flat,
    rank_of,
    score_of,
    stability_of,
    threshold_of,
    thresholds_in_groups,
    token_values,
)
from alphatoken.pipeline.settings.mask import MASK_SCORES

ANY_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=True, allow_subnormal=True)
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 0.5, math.inf, -math.inf])
VALUES = arrays(np.float32, st.integers(1, 60), elements=st.one_of(ANY_FLOAT, FEW))


def select(stream, k: int) -> np.float32:
    ranks = RankSelect()
    for values in stream:
        ranks.count(values)
    assert ranks.total == sum(len(values) for values in stream)
    ranks.choose(k)
    for values in stream:
        ranks.refine(values)
    return ranks.threshold()


@given(VALUES, st.data())
def test_radix_selection_is_the_kth_largest_of_a_sort(values, data):
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    assert select([values[:cut], values[cut:]], k) == np.sort(values)[::-1][k - 1]


@pytest.mark.parametrize("spread", [1.0, 1e-38, 1e30, 0.0])
def test_radix_selection_on_many_values(spread):
    rng = np.random.default_rng(1)
    values = (rng.standard_normal(20_000) * spread).astype(np.float32)
    values[::7] = values[3]  # ties
    ordered = np.sort(values)[::-1]
    for k in (1, 2, 777, 10_000, 19_999, 20_000):
        assert select(np.array_split(values, 13), k) == ordered[k - 1]


def test_negative_zero_equals_zero():
    values = np.array([-0.0, 0.0, -0.0], np.float32)
    for k in (1, 2, 3):
        found = select([values], k)
        assert found == 0 and (values >= found).all()


def test_what_cannot_be_ranked_is_refused():
    for function in (RankSelect().count, lambda v: threshold_of(v, 0.5)):
        with pytest.raises(ValueError, match="NaN"):
            function(np.array([1.0, np.nan], np.float32))
    with pytest.raises(TypeError, match="float32"):
        RankSelect().count(np.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        threshold_of(np.zeros(0, np.float32), 0.5)
    ranks = RankSelect()
    with pytest.raises(ValueError, match="1-th"):
        ranks.choose(1)
    ranks.count(np.ones(4, np.float32))
    ranks.choose(2)
    ranks.refine(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="second pass"):
        ranks.threshold()


def test_memory_of_the_selection_does_not_depend_on_the_data():
    ranks = RankSelect()
    size = sys.getsizeof(ranks._high) + sys.getsizeof(ranks._low)
    for _ in range(20):
        ranks.count(np.arange(10_000, dtype=np.float32))
    assert size < 1.1 * 2**20
    assert sys.getsizeof(ranks._high) + sys.getsizeof(ranks._low) == size


@pytest.mark.parametrize(
    ("rho", "n", "k"), [(0.3, 10, 3), (0.7, 10, 7), (0.1, 30, 3), (0.5, 7, 4), (1e-9, 5, 1), (1, 5, 5), (0.29, 100, 29)]
)
def test_rank_takes_the_fraction_as_typed(rho, n, k):
    assert rank_of(rho, n) == k


@given(VALUES, st.integers(1, 100))
def test_threshold_keeps_the_fraction_and_all_ties(values, percent):
    k = math.ceil(Fraction(percent, 100) * len(values))
    threshold = threshold_of(values, percent / 100)
    assert threshold == np.sort(values)[::-1][k - 1]
    assert (values >= threshold).sum() >= k > (values > threshold).sum()


def test_value_is_scaled_adaptation_plus_weighted_stability_rounded_once():
    rng = np.random.default_rng(2)
    names = ("adaptation_direct", "adaptation_causal", "stability_direct", "stability_causal")
    parts = {name: rng.standard_normal(500).astype(np.float32) for name in names}
    found = token_values(parts, "paper", 1.5, {"score": 3.0, "stability": 0.7})
    rows = zip(*(parts[name].tolist() for name in names), strict=True)
    assert found.dtype == np.float32
    assert found.tolist() == [float(np.float32((a + b) / 3.0 + 1.5 * (c + d) / 0.7)) for a, b, c, d in rows]
    for scale in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scales"):
            token_values(parts, "paper", 1.5, {"score": 1.0, "stability": scale})
    without = token_values(parts, "paper", 0.0, {"score": 3.0})  # a term that weighs nothing needs no scale
    pairs = zip(*(parts[name].tolist() for name in names[:2]), strict=True)
    assert without.tolist() == [float(np.float32((a + b) / 3.0)) for a, b in pairs]


def test_every_score_is_its_definition_and_looks_at_its_columns_alone():
    rng = np.random.default_rng(4)
    names = (
        "adaptation_direct", "adaptation_causal", "adaptation_exact", "adaptation_unrolled", "information", "entropy", "loss",
        "random",
    )  # fmt: skip
    c = {name: rng.standard_normal(50).astype(np.float32) for name in (*names, "reference_loss")}
    wide = {name: column.astype(np.float64) for name, column in c.items()}
    expected = {
        "paper": wide["adaptation_direct"] + wide["adaptation_causal"], "exact": wide["adaptation_exact"],
        "unrolled": wide["adaptation_unrolled"],
        "information": wide["information"], "entropy": wide["entropy"], "loss": -wide["loss"],
        "excess_loss": wide["loss"] - wide["reference_loss"], "random": wide["random"], "full": np.zeros(50),
    }  # fmt: skip
    assert set(expected) == set(MASK_SCORES)
    for score, wanted in expected.items():
        own = {name: c[name] for name in (*MASK_SCORES[score], *["random"][: score == "random"])} or {"loss": c["loss"]}
        found = score_of(own, score)
        assert found.dtype == np.float64 and found.tolist() == wanted.tolist(), score
    stability = {name: rng.standard_normal(50).astype(np.float32) for name in ("stability_direct", "stability_causal")}
    both = [column.astype(np.float64) for column in stability.values()]
    for score in expected.keys() - {"exact", "unrolled"}:
        assert stability_of(stability, score).tolist() == (both[0] + both[1]).tolist()
    for score in ("exact", "unrolled"):
        assert stability_of({f"stability_{score}": c["loss"]}, score).tolist() == wide["loss"].tolist()


def naive_keep(values, response, threshold, always, min_kept):
    tokens = [i for i in range(len(values)) if response[i]]
    kept = {i for i in tokens if values[i] >= threshold or always[i]}
    for i in sorted(tokens, key=lambda i: (-values[i], i)):
        if len(kept) < min(min_kept, len(tokens)):
            kept.add(i)
    return [i in kept for i in range(len(values))]


@given(VALUES, st.data())
def test_keep_is_its_definition(values, data):
    booleans = arrays(np.bool_, len(values))
    response, always = data.draw(booleans), data.draw(booleans)
    min_kept, threshold = data.draw(st.integers(0, 6)), np.float32(data.draw(ANY_FLOAT))
    found = keep(values, response, threshold, always, min_kept)
    assert found.dtype == np.bool_
    assert found.tolist() == naive_keep(values, response, threshold, always, min_kept)


def test_always_keep_stays_within_the_response_and_ties_go_to_the_earlier():
    values = np.array([9, 1, 1, 1, 0], np.float32)
    response = np.array([False, True, True, True, True])
    always = np.array([True, False, False, False, True])
    assert keep(values, response, 5.0, always, 0).tolist() == [False, False, False, False, True]
    assert keep(values, response, 5.0, always, 3).tolist() == [False, True, True, False, True]
    assert keep(values, response, 5.0, always, 99).tolist() == response.tolist()


def test_keep_flat_is_keep_of_every_example_also_of_empty_ones():
    rng = np.random.default_rng(3)
    offsets = np.array([0, 0, 5, 6, 6, 20, 20])
    values = rng.integers(0, 5, 20).astype(np.float32)
    always = rng.random(20) < 0.2
    threshold = np.repeat(rng.integers(2, 7, 6).astype(np.float32), np.diff(offsets))
    found = keep_flat(values, offsets, threshold, always, 3)
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        if stop > start:
            inside = slice(start, stop)
            alone = keep(values[inside], np.ones(stop - start, bool), threshold[start], always[inside], 3)
            assert found[inside].tolist() == alone.tolist()


def test_groups_take_consecutive_examples_and_leave_out_groups_without_tokens():
    offsets = np.array([0, 0, 0, 4, 6, 6, 9])
    values = np.array([4, 3, 2, 1, 6, 5, 9, 8, 7], np.float32)
    per_token, groups = thresholds_in_groups(values, offsets, 2, 0.5)
    assert groups.tolist() == [4.0, 8.0]  # (empty), (4 3 2 1 6 5), (9 8 7)
    assert per_token.tolist() == [4.0] * 6 + [8.0] * 3
    per_token, groups = thresholds_in_groups(values, offsets, 1, 0.5)
    assert groups.tolist() == [3.0, 6.0, 8.0] and len(per_token) == 9


def test_needs_no_torch():
    code = "import alphatoken.pipeline.maths.masking, sys; assert not {'torch', 'ray', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

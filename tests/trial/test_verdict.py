"""What is said of numbers: paired differences, spreads, one sentence."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from alphatoken.pipeline.trial.candidates import FIRST, FULL, UNTOUCHED
from alphatoken.pipeline.trial.verdict import SEEN, Measured, difference, judge, row_error

TOKENS = [10, 20, 10, 20]
PERCENTS = {FULL: 100, FIRST: 100, UNTOUCHED: 0, "m": 50, "n": 50, "random 50 %": 50}
KINDS = {FULL: "full", FIRST: "first", UNTOUCHED: "untouched", "random 50 %": "random"}


def measured(name: str, seed: int, loss: float, retention: float = 0.1, failed: str | None = None) -> Measured:
    """Every row has this loss per token."""
    rows = [] if failed else [loss * n for n in TOKENS]
    return Measured(
        name, KINDS.get(name, "mask"), seed, PERCENTS[name] / 100, 5, None if failed else loss,
        None if failed else retention, rows, [] if failed else TOKENS, failed,
    )  # fmt: skip


def found(**losses: list) -> list[Measured]:
    """Losses of every seed by name; of full, 1.0 at all three with seeds far apart."""
    names = {"full": FULL, "first": FIRST, "random": "random 50 %", "untouched": UNTOUCHED}
    return [
        measured(names.get(name, name), seed, loss) for name, own in losses.items() for seed, loss in enumerate(own)
    ]


BASE = {"full": [1.0, 1.2, 1.4], "untouched": [2.0]}


def test_differences_are_paired_by_seed_so_that_what_all_share_drops_out():
    verdict = judge(found(**BASE, m=[0.9, 1.1, 1.29], random=[1.0, 1.21, 1.4]), PERCENTS, seen=False)
    line = next(line for line in verdict.lines if line.name == "m")
    assert line.adaptation == (pytest.approx((0.9 + 1.1 + 1.29) / 3), pytest.approx(0.195))
    assert line.to_full.mean == pytest.approx(-0.31 / 3) and line.to_full.spread == pytest.approx(0.005)
    assert line.to_full.exceeds and line.to_random.exceeds
    assert verdict.winner == "m" and verdict.sentence.startswith("Train on mask m:")
    assert "0.1033" in verdict.sentence and "below a random mask of its size" in verdict.sentence
    adaptations = [line.adaptation[0] for line in verdict.lines]
    assert all(one <= other for one, other in pairwise(adaptations)) and verdict.lines[-1].name == UNTOUCHED


def test_what_wins_in_the_last_layers_alone_is_said_to_have_done_so():
    won, lost = (found(**BASE, m=own, random=[1.0, 1.21, 1.4]) for own in ([0.9, 1.1, 1.29], [1.1, 1.3, 1.5]))
    caveat = "the last 3 layers alone learned"
    assert judge(won, PERCENTS, False, caveat=caveat).sentence.endswith("of its size; the last 3 layers alone learned.")
    assert caveat not in judge(won, PERCENTS, False).sentence + judge(lost, PERCENTS, False, caveat=caveat).sentence


def test_what_does_not_exceed_the_spread_wins_nothing():
    verdict = judge(found(**BASE, m=[0.9, 1.25, 1.39]), PERCENTS, seen=False)  # one seed has another sign
    assert verdict.winner == FULL and verdict.sentence.startswith("No mask beats training on everything")
    assert "mask m" in verdict.sentence and "made the directions" not in verdict.sentence
    worse = judge(found(**BASE, m=[1.1, 1.3, 1.5]), PERCENTS, seen=False)
    assert worse.winner == FULL and "+0.1000" in worse.sentence


def test_a_mask_that_is_no_better_than_a_random_one_is_said_to_be_so():
    verdict = judge(found(**BASE, m=[0.9, 1.1, 1.3], random=[0.9, 1.1, 1.3]), PERCENTS, seen=False)
    assert verdict.winner == "m" and "a random mask of its size does as well" in verdict.sentence


def test_one_seed_judges_nothing():
    verdict = judge(found(full=[1.0], untouched=[2.0], m=[0.5]), PERCENTS, seen=False)
    assert verdict.winner == FULL and "No mask beats" not in verdict.sentence
    assert verdict.sentence == (
        "One seed cannot judge: the best, mask m, ends -0.5000 nats per token from training on everything; trial.seeds=3 can."
    )
    assert next(line for line in verdict.lines if line.name == "m").to_full.spread is None


def test_a_mask_with_numbers_of_one_seed_is_not_judged_among_three():
    rows = [m for m in found(**BASE, m=[1.05, 1.25, 1.45], n=[0.2, 0.3, 0.4]) if m.candidate != "n" or m.seed == 0]
    verdict = judge(rows, PERCENTS, seen=False)
    assert "One seed" not in verdict.sentence and "the best, mask m" in verdict.sentence


def test_a_gentler_mask_is_named_where_none_learns_more():
    rows = found(**BASE, m=[1.01, 1.19, 1.4])
    rows = [measured(m.candidate, m.seed, m.adaptation, 0.02 if m.candidate == "m" else 0.1) for m in rows]
    verdict = judge(rows, PERCENTS, seen=False)
    assert (
        verdict.winner == FULL
        and "mask m learns as much" in verdict.sentence
        and "0.0200 against 0.1000" in verdict.sentence
    )


def test_training_that_does_harm_is_said_first():
    verdict = judge(found(full=[1.0, 1.0, 1.0], untouched=[0.9], m=[1.1, 1.1, 1.1]), PERCENTS, seen=False)
    assert "Training does not help at all" in verdict.sentence and "trial.learning_rate" in verdict.sentence


def test_rows_that_made_the_directions_are_said_in_the_sentence():
    assert SEEN in judge(found(**BASE, m=[0.9, 1.1, 1.3]), PERCENTS, seen=True).sentence


def test_a_fine_tune_that_failed_is_named_and_the_others_stand():
    rows = [
        *found(**BASE, m=[0.9, 1.1]),
        measured("m", 2, 0.0, failed="NaN at step 3"),
        measured("n", 0, 0.0, failed="NaN"),
    ]
    verdict = judge(rows, PERCENTS, seen=False)
    assert verdict.failed == ("m, seed 2: NaN at step 3", "n, seed 0: NaN")
    line = next(line for line in verdict.lines if line.name == "m")
    assert line.seeds == 2 and line.to_full.mean == pytest.approx(-0.1)
    assert "n" not in {line.name for line in verdict.lines}
    with pytest.raises(ValueError, match="full"):
        judge([measured(FULL, 0, 0.0, failed="NaN"), measured("m", 0, 1.0)], PERCENTS, seen=False)


def test_of_several_seeds_of_which_one_has_numbers_no_mask_is_judged():
    failed = [measured(FULL, seed, 0.0, failed="NaN") for seed in (1, 2)]
    verdict = judge([measured(FULL, 0, 1.0), *failed, *found(m=[0.9, 1.0, 1.1])], PERCENTS, seen=False)
    assert verdict.winner == FULL and verdict.sentence.startswith("Too few fine-tunes have numbers")
    failed = [measured("m", seed, 0.0, failed="NaN") for seed in (1, 2)]
    verdict = judge([*found(**BASE), measured("m", 0, 0.9), *failed], PERCENTS, seen=False)
    assert verdict.sentence.startswith("Too few fine-tunes have numbers")


def test_the_winner_is_the_one_with_the_largest_paired_difference_though_a_seed_of_another_has_failed():
    """Of m the seed with the highest losses is missing, so that its mean is the lowest of all."""
    rows = [*found(**BASE, m=[0.97, 1.17], n=[0.9, 1.1, 1.3]), measured("m", 2, 0.0, failed="NaN at step 3")]
    verdict = judge(rows, PERCENTS, seen=False)
    assert [line.name for line in verdict.lines][0] == "m" and verdict.winner == "n"
    assert verdict.sentence.startswith("Train on mask n: it ends 0.1000")
    rows = [*found(**BASE, m=[1.04, 1.24], n=[1.01, 1.21, 1.41]), measured("m", 2, 0.0, failed="NaN at step 3")]
    assert "the best, mask n, ends +0.0100" in judge(rows, PERCENTS, seen=False).sentence


def test_the_spread_is_two_standard_errors_over_rows_and_retention_has_its_own_difference():
    one, other = (
        {s: measured(name, s, 1.0, retention) for s in range(2)} for name, retention in (("m", 0.3), (FULL, 0.1))
    )
    gaps = np.array([1.0, 2.0, 4.0, 9.0])
    tokens = [1, 1, 1, 1]
    one = {s: replace(m, row_losses=gaps.tolist(), row_tokens=tokens) for s, m in one.items()}
    other = {s: replace(m, row_losses=[0.0] * 4, row_tokens=tokens) for s, m in other.items()}
    apart = difference(one, other)
    assert apart.mean == gaps.mean() and apart.spread == pytest.approx(2 * gaps.std(ddof=1) / 4**0.5)
    verdict = judge([*one.values(), *other.values()], PERCENTS, seen=False)
    moved = next(line.moved for line in verdict.lines if line.name == "m")
    assert moved.mean == pytest.approx(0.2) and moved.spread == 0 and moved.exceeds


def test_the_error_over_rows_is_that_of_redrawn_rows():
    """Against the spread of the same mean over many sets of rows of the same kind."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, (4000, 30)).astype(float)
    gaps = tokens * (0.02 + 0.1 * rng.standard_normal(tokens.shape))
    means = gaps.sum(axis=1) / tokens.sum(axis=1)
    errors = [row_error(g, t) for g, t in zip(gaps, tokens, strict=True)]
    assert np.mean(errors) == pytest.approx(means.std(), rel=0.06)


def test_rows_that_disagree_widen_the_spread():
    one = {s: measured("m", s, 1.0) for s in range(3)}
    other = {s: measured(FULL, s, 1.1) for s in range(3)}
    assert difference(one, other).exceeds
    torn = {
        s: Measured(*[*[getattr(m, f) for f in Measured.__slots__[:7]], [8.0, 33.0, 4.0, 21.0], TOKENS, None])
        for s, m in other.items()
    }
    found = difference(one, torn)
    assert (
        found.mean == pytest.approx(-0.1) and found.spread > 0.1 and not found.exceeds and math.isfinite(found.spread)
    )

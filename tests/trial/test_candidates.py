"""The labels of what stands beside the masks."""

import numpy as np

from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from alphatoken.pipeline.trial.candidates import (
    candidates,
    kept_tokens,
    known_by_labels,
    labels_of,
    random_labels,
    random_name,
    random_sizes,
    without_first,
)

ROWS = Sequences(
    [f"row-{i}" for i in range(20)],
    [list(range(3, 23))] * 20,
    [[*[IGNORED] * 5, *range(8, 13), IGNORED, IGNORED, *range(15, 23)]] * 20,
)


def test_masks_of_one_size_share_a_random_one_and_names_do_not_clash_on_disk():
    labels = {name: [np.asarray([i], np.int32)] for i, name in enumerate(["a", "b", "full", "all"])}
    found = known_by_labels(candidates({"a": 0.502, "b": 0.498, "full": 0.9, "all": 1.0}), labels)
    assert [one.name for one in found if one.kind == "random"] == [random_name(50), random_name(90)]
    assert len({one.directory for one in found}) == len(found)
    assert [len(one.seeds(3)) for one in found[:2]] == [1, 3]


def test_masks_within_a_percent_share_the_larger_random_one():
    assert random_sizes({50, 51, 70, 90}) == {51: 51, 50: 51, 70: 70, 90: 90}
    assert random_sizes({49, 50, 51}) == {51: 51, 50: 51, 49: 49}  # never two percent apart
    assert random_sizes({1, 2}) == {2: 2, 1: 1}  # one percent more is twice as many
    found = {one.name: one for one in candidates({"a": 0.503, "b": 0.511, "all": 1.0})}
    assert found["a"].random == found["b"].random == 51 and found["all"].random == 100
    assert [one.name for one in found.values() if one.kind == "random"] == [random_name(51)]


def test_masks_that_leave_the_same_share_their_files():
    whole = [np.asarray(row, np.int32) for row in ROWS.labels]
    less = [without_first(row) for row in whole]
    masks = {"a": whole, "b": less, "c": [row.copy() for row in whole]}
    found = {one.name: one for one in known_by_labels(candidates(dict.fromkeys(masks, 0.5)), masks)}
    assert found["c"].twin == "a" and found["c"].directory == found["a"].directory != found["b"].directory
    assert found["c"].identity == found["a"].identity != found["b"].identity
    assert found["a"].twin is found["b"].twin is None and found["full"].identity == "full"


def test_random_labels_are_drawn_anew_for_each_seed_and_of_the_size_asked_for():
    one, *_ = (c for c in candidates({"a": 0.5}) if c.kind == "random")
    first, again, other = (labels_of(one, ROWS, seed, {}) for seed in (1, 1, 2))
    assert kept_tokens(first) == kept_tokens(other) == 130  # of 260
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    for row, whole in zip(first, ROWS.labels, strict=True):
        assert all(label in (IGNORED, own) for label, own in zip(row, whole, strict=True))


def test_random_labels_of_rows_without_a_response_are_none():
    empty = [np.full(4, IGNORED, np.int32)]
    assert kept_tokens(random_labels(empty, ["a"], 0.5, 0)) == 0


def test_the_first_token_of_each_turn_is_left_out():
    whole = np.array(ROWS.labels[0], np.int32)
    assert np.flatnonzero(without_first(whole) != whole).tolist() == [5, 12]
    later = np.array([-100, 4, 5, -100, 6], np.int32)
    for name, left_out in (("a#2", [4]), ("a#10", [4]), ("a#1", [1, 4]), ("a", [1, 4])):
        assert np.flatnonzero(without_first(later, name) != later).tolist() == left_out

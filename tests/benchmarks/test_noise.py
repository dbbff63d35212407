"""The planted-noise benchmark: what is planted, and the area under the curve."""

import random

import numpy as np
import pytest

from alphatoken.pipeline.maths.batch import IGNORED
from benchmarks.quality.noise import area_under_curve, areas, plant_tokens, swap_rows


def rows(count: int = 40):
    generator = random.Random(3)
    made = []
    for _ in range(count):
        prompt, response = generator.randint(1, 9), generator.randint(1, 30)
        ids = [generator.randint(0, 20) for _ in range(prompt + response)]
        made.append((ids, [IGNORED] * prompt + ids[prompt:]))
    return made


def test_a_share_of_the_response_tokens_is_replaced_and_remembered():
    clean = rows()
    noisy, planted = plant_tokens(clean, 0.2, seed=1)
    total = sum(label != IGNORED for _, labels in clean for label in labels)
    assert sum(map(sum, planted)) == round(0.2 * total)
    for (ids, labels), (new_ids, new_labels), own in zip(clean, noisy, planted, strict=True):
        changed = [a != b for a, b in zip(ids, new_ids, strict=True)]
        assert changed == own  # a replacement never is the token that stood there
        assert [label == IGNORED for label in new_labels] == [label == IGNORED for label in labels]
        assert all(label in (IGNORED, token) for label, token in zip(new_labels, new_ids, strict=True))
    assert plant_tokens(clean, 0.2, seed=1) == (noisy, planted) != plant_tokens(clean, 0.2, seed=2)


def test_responses_are_handed_round_between_a_share_of_the_prompts():
    clean = rows()
    noisy, planted = swap_rows(clean, 0.2, seed=1)
    moved = [i for i, own in enumerate(planted) if any(own)]
    assert len(moved) == 8
    responses = [[label for label in labels if label != IGNORED] for _, labels in clean]
    for i, ((ids, labels), (new_ids, new_labels)) in enumerate(zip(clean, noisy, strict=True)):
        prompt = labels.count(IGNORED)
        assert new_ids[:prompt] == ids[:prompt] and len(planted[i]) == len(new_ids) == len(new_labels)
        assert (new_ids == ids) == (i not in moved)
        assert planted[i] == [i in moved and label != IGNORED for label in new_labels]
    given = sorted([label for label in noisy[i][1] if label != IGNORED] for i in moved)
    assert given == sorted(responses[i] for i in moved)


def test_the_area_is_the_share_of_pairs_in_which_the_clean_token_is_higher():
    generator = np.random.default_rng(0)
    scores, planted = np.round(generator.standard_normal(200), 1), generator.random(200) < 0.3  # with ties
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[~planted] for b in scores[planted]]
    assert area_under_curve(scores, planted) == pytest.approx(np.mean(pairs))
    assert area_under_curve(-scores, planted) == pytest.approx(1 - np.mean(pairs))


def test_the_table_has_a_row_per_score_and_a_column_per_kind():
    found = [{"column": "a", "kind": "tokens", "auc": auc} for auc in (0.5, 0.7)]
    found += [{"column": "b", "kind": "rows", "auc": 0.25}]
    assert areas(found).splitlines() == [
        "| score | tokens planted | rows planted |", "|---|---|---|", "| a | 0.600 | - |", "| b | - | 0.250 |",
    ]  # fmt: skip

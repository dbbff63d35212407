"""Thresholds of many groups at once, against a dictionary of lists."""

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphatoken.pipeline.maths import group_select
from alphatoken.pipeline.maths.group_select import GroupSelect, TokenGroups, select_in_memory
from alphatoken.pipeline.maths.masking import rank_of

ANY_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=True, allow_subnormal=True)
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 0.5, math.inf, -math.inf])
TOKENS = st.lists(st.tuples(st.integers(0, 9), st.one_of(ANY_FLOAT, FEW)), min_size=1, max_size=80)


def blocks(tokens, cuts):
    """(ids, values) of the pieces of a stream."""
    ids = np.array([token for token, _ in tokens], np.int32)
    values = np.array([value for _, value in tokens], np.float32)
    edges = [0, *sorted(cuts), len(tokens)]
    return [(ids[a:b], values[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def thresholds_of_ids(tokens, rho, rare):
    """The definition: token id -> threshold, from a list of values per id."""
    by_id = defaultdict(list)
    for token, value in tokens:
        by_id[token].append(value)
    pool = [value for values in by_id.values() if len(values) < rare for value in values]
    lists = {token: values if len(values) >= rare else pool for token, values in by_id.items()}
    return {token: sorted(v, reverse=True)[rank_of(rho, len(v)) - 1] for token, v in lists.items()}


def selected(stream, rho, rare):
    groups = TokenGroups()
    for ids, _ in stream:
        groups.count(ids)
    groups.close(rare)
    ranks = np.array([[rank_of(rho, int(size))] for size in groups.sizes])
    select = GroupSelect(ranks)
    for _ in range(select.passes):
        for ids, values in stream:
            select.count(values, groups.of(ids))
        select.choose()
    return groups, select


@pytest.mark.parametrize("bits", [4, 8])
@settings(deadline=None)
@given(TOKENS, st.integers(1, 100), st.integers(0, 12), st.data())
def test_every_id_gets_the_threshold_of_its_own_list(bits, tokens, percent, rare, data):
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_select, "WIDE_DIGITS_UP_TO", 1 << 14 if bits == 8 else 0)
        groups, select = selected(blocks(tokens, cuts), percent / 100, rare)
    assert select.bits == bits
    expected = thresholds_of_ids(tokens, percent / 100, rare)
    ids = np.array(sorted(expected))
    assert select.found()[groups.of(ids), 0].tolist() == [np.float32(expected[i]) for i in ids.tolist()]
    assert groups.sizes.sum() == len(tokens)
    occurs = np.bincount([token for token, _ in tokens])
    assert groups.pooled_ids == ((occurs > 0) & (occurs < rare)).sum()
    assert groups.pooled_tokens == occurs[occurs < rare].sum()


@settings(deadline=None)
@given(TOKENS, st.data())
def test_several_ranks_of_a_group_and_the_same_in_memory(tokens, data):
    stream = blocks(tokens, [])
    groups = TokenGroups()
    groups.count(stream[0][0])
    groups.close(3)
    ranks = np.array([[data.draw(st.integers(1, size)) for _ in range(3)] for size in groups.sizes.tolist()])
    select, (ids, values) = GroupSelect(ranks), stream[0]
    for _ in range(select.passes):
        select.count(values, groups.of(ids))
        select.choose()
    number = groups.of(ids)
    expected = [
        [np.sort(values[number == group])[::-1][rank - 1] for rank in row] for group, row in enumerate(ranks.tolist())
    ]
    assert select.found().tolist() == expected
    assert select_in_memory(values, number, ranks).tolist() == expected


def test_pooling_everything_makes_one_group():
    groups = TokenGroups()
    groups.count(np.array([5, 5, 9]))
    groups.count(np.array([0]))
    groups.close(math.inf)
    assert groups.sizes.tolist() == [4] and groups.of(np.array([0, 9, 5])).tolist() == [0, 0, 0]


def test_a_stream_that_changes_is_refused():
    select = GroupSelect(np.array([[2]]))
    with pytest.raises(ValueError, match="read 4 times"):
        select.found()
    select.count(np.ones(3, np.float32), np.zeros(3, np.int64))
    select.choose()
    select.count(np.ones(2, np.float32), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="did not see"):
        select.choose()
    with pytest.raises(ValueError, match="fewer values"):
        GroupSelect(np.array([[1]])).choose()


def test_thresholds_of_as_many_ids_as_a_large_vocabulary_has_take_a_few_bytes_each():
    select = GroupSelect(np.ones((150_000, 1), np.int64))
    assert select._counts.nbytes + select._prefix.nbytes + select._left.nbytes < 24 * 2**20

"""How far short fine-tunes agree with whole ones: the record, and what is counted."""

import random

import pytest

from alphatoken.jobs.config import load
from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from benchmarks.quality.agreement import Whole, agreement, mean_by_name, record
from benchmarks.quality.grid import ROWS, RUNS
from benchmarks.quality.short import Setting, ShortFineTunes
from benchmarks.quality.tries import DRAWN, HELD_OUT, SETTINGS, VALUED, table

WHOLE = {"a": Whole(1.0, 0.1), "b": Whole(1.05, 0.1), "c": Whole(1.3, 0.1), "d": Whole(2.0, 0.5)}


def test_the_record_is_of_rows_that_the_grid_can_make():
    names = {row.name for row in ROWS} | {"untouched", "paper's loop 0.5 (online)"}
    for column in HELD_OUT:
        found = record(column)
        assert set(found) <= names and len(found) > 30
        assert all(0.5 < one.loss < 4 and 0 <= one.spread < 0.02 for one in found.values())
    tried = {row.name for row in ROWS if row.run in VALUED or row.name in DRAWN}
    assert len(tried & record("code").keys()) >= 29


def test_pairs_within_the_spread_are_not_counted():
    found = agreement({"a": 1.0, "b": 0.9, "c": 1.2, "d": 1.1}, WHOLE)
    # a and b are not apart; a-c, b-c, a-d, b-d and c-d are, of which c-d is the other way round
    assert (found.masks, found.pairs, found.rightly) == (4, 5, 4)
    assert found.place == 2  # b, of which a is better
    assert found.correlation == pytest.approx(0.6)


def test_what_is_in_one_alone_is_left_out():
    same = agreement({"a": 1.0, "b": 1.1, "c": 1.2, "e": 0.0}, WHOLE)
    assert (same.masks, same.correlation, same.place) == (3, pytest.approx(1.0), 1)
    with pytest.raises(ValueError, match="three"):
        agreement({"a": 1.0, "e": 0.0}, WHOLE)


def test_the_mean_is_over_seeds():
    lines = [{"name": "a", "code": 1.0}, {"name": "a", "code": 2.0}, {"name": "b", "code": 3}]
    assert mean_by_name(lines, "code") == {"a": 1.5, "b": 3.0}


def test_the_table_has_a_line_per_setting_and_kind_of_rows():
    lines = [
        {"setting": "trial's own", "seed": 0, "name": name, "cpu": 2.0, "seconds": 3.0, **dict.fromkeys(HELD_OUT, loss)}
        for loss, name in enumerate(("full", "default 0.5", "random 0.5"))
    ]
    assert table(lines).count("\n") == 1 + len(HELD_OUT)
    assert "| trial's own | 1 | 2 | code | 3 | 1.00 | 1 | 3 of 3 |" in table(lines)


@pytest.mark.parametrize("train", ["layers", "lora"])
def test_short_fine_tunes_learn_what_they_are_given(policy, train):
    generator = random.Random(1)
    ids = [[generator.randrange(5, 60) for _ in range(12)] for _ in range(4)]
    labels = [[IGNORED] * 4 + row[4:] for row in ids]
    rows = Sequences([f"row-{i}" for i in range(4)], ids, labels)
    short = ShortFineTunes(policy, {"seen": rows}, "float32")
    setting = Setting(layers=2, learning_rate=1e-2, examples=3, epochs=4, train=train)
    before, after = short.measure(None, setting, 0), short.measure(rows, setting, 0)
    assert before["trained"] == 0 and after["trained"] == setting.steps * 2 * 8
    assert after["seen"] < before["seen"] - 0.1
    assert short.measure(None, setting, 0)["seen"] == before["seen"]  # the model itself stays as it is
    assert short.measure(rows, setting, 0)["seen"] == after["seen"] != short.measure(rows, setting, 1)["seen"]


def test_settings_are_of_like_size():
    own = SETTINGS["trial's own"]
    assert load([]).trial.rate == own.learning_rate and load([]).trial.batch_size == own.batch_size
    assert load([]).valuation.layers == own.layers
    assert all(one.steps >= 1 for one in SETTINGS.values())
    assert RUNS.keys() >= set(VALUED)

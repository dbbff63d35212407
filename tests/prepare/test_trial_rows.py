"""Rows that are kept for a trial: cut from the validation set by the seed, or of their own; nothing changes without."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from alphatoken.pipeline.prepare.draw import LEAST_TO_CUT, halves
from tests.conftest import SMALL, chat_row, write_rows


def sources(run: Path, name: str) -> list[str]:
    return pq.read_table(run / f"prepared/{name}.parquet")["source"].to_pylist()


def counts(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())["stages"]["prepare"]["counts"]


def test_halves_are_disjoint_and_depend_on_the_seed():
    for rows in (LEAST_TO_CUT, 33):
        directions, trial = halves(rows, 0)
        assert sorted([*directions, *trial]) == list(range(rows)) and abs(len(directions) - len(trial)) <= 1
        assert halves(rows, 0) == (directions, trial) != halves(rows, 1)
    assert halves(LEAST_TO_CUT - 1, 0) == (list(range(LEAST_TO_CUT - 1)), [])


@pytest.fixture
def prepare(alphatoken, tmp_path, policy, train_file):
    def make(name: str, *more: str) -> tuple[Path, str]:
        run = tmp_path / name
        arguments = [f"run.dir={run}", f"model.policy={policy}", f"data.train={train_file}", *SMALL, *more]
        status, _, err = alphatoken("prepare", *arguments)
        assert status == 0, err
        return run, err

    return make


def test_held_out_rows_are_cut_in_two_and_the_rest_stays(prepare):
    plain, _ = prepare("plain", "data.validation=12")
    cut, err = prepare("cut", "data.validation=12", "data.validation_trial=half")
    auto, _ = prepare("auto", "data.validation=12", "trial.auto=true")
    assert "6 for validation, 6 for trials" in err and counts(cut)["trial_rows"] == 6
    assert len(sources(cut, "validation")) == len(sources(cut, "trial")) == 6
    assert sorted(sources(cut, "validation") + sources(cut, "trial")) == sorted(sources(plain, "validation"))
    assert (
        not (plain / "prepared/trial.parquet").exists()
        and "data.validation_trial" not in (json.loads((plain / "run.json").read_text())["stages"]["prepare"]["inputs"])
    )
    for name in ("fisher", "part-00000-of-00003"):
        assert sources(cut, name) == sources(plain, name)
    for name in ("validation", "trial"):
        assert sources(auto, name) == sources(cut, name)


def test_a_lost_half_is_made_again(prepare):
    run, _ = prepare("r", "data.validation=12", "data.validation_trial=half")
    before = (run / "prepared/trial.parquet").read_bytes()
    (run / "prepared/trial.parquet").unlink()
    again, err = prepare("r", "data.validation=12", "data.validation_trial=half")
    assert (run / "prepared/trial.parquet").read_bytes() == before and counts(run)["trial_rows"] == 6
    assert "done already" not in err


def test_too_few_rows_are_not_cut_and_that_is_said(prepare):
    run, err = prepare("r", "data.validation=7", "data.validation_trial=half")
    assert "too few to be cut in two" in err and "data.validation_trial" in err
    assert len(sources(run, "validation")) == 7 and not (run / "prepared/trial.parquet").exists()


def test_a_validation_file_is_cut_and_rows_of_their_own_leave_it_whole(prepare, tmp_path):
    file = write_rows(tmp_path / "v.jsonl", [*[chat_row(i) for i in range(500, 510)], {"other": 1}])
    other = write_rows(tmp_path / "t.jsonl", [chat_row(i) for i in range(600, 603)])
    cut, _ = prepare("cut", f"data.validation={file}", "data.validation_trial=half")
    own, _ = prepare("own", f"data.validation={file}", f"data.validation_trial={other}")
    found = sources(cut, "validation") + sources(cut, "trial")
    assert len(set(found)) == len(found) == 10 and counts(cut)["trial_rows"] == len(sources(cut, "trial"))
    rejected = [pq.read_table(p).num_rows for p in (cut / "quarantine").glob("*.parquet")]
    assert sum(rejected) == 1
    assert len(sources(own, "validation")) == 10 and sources(own, "trial") == [f"{other}:{i}" for i in range(3)]

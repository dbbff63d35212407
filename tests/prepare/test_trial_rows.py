"""Rows that are kept for a trial: cut from the validation set by the seed, or of their own; nothing changes without."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from alphatoken.data_schemas import PREFERENCE_PREPARED, PREPARED
from alphatoken.pipeline.prepare.draw import LEAST_TO_CUT, halves
from alphatoken.pipeline.prepare.reader import branches_of, sequences_of
from tests.conftest import SMALL, chat_row, pair_row, write_rows


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
    def make(name: str, *more: str, status: int = 0) -> tuple[Path, str]:
        run = tmp_path / name
        arguments = [f"run.dir={run}", f"model.policy={policy}", f"data.train={train_file}", *SMALL, *more]
        found, _, err = alphatoken("prepare", *arguments)
        assert found == status, err
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


def table(run: Path, name: str):
    return pq.read_table(run / f"prepared/{name}.parquet")


def test_rows_that_should_not_be_forgotten_are_prepared_beside_the_others_and_change_nothing_else(prepare, tmp_path):
    file = write_rows(
        tmp_path / "keep.jsonl", [*[chat_row(i) for i in range(700, 704)], {"prompt": "a", "completion": ""}]
    )
    plain, _ = prepare("plain", "data.validation=6")
    kept, err = prepare("kept", "data.validation=6", f"data.retention={file}")
    assert "6 for validation, 4 for retention" in err and counts(kept)["retention_rows"] == 4
    assert table(kept, "retention").schema.equals(PREPARED)
    assert sources(kept, "retention") == [f"{file}:{i}" for i in range(4)]
    assert counts(kept)["reasons"] == {"retention empty_response": 1}
    for name in ("validation", "fisher", "part-00000-of-00004"):
        assert table(kept, name).equals(table(plain, name))
    assert "data.retention" not in json.loads((plain / "run.json").read_text())["stages"]["prepare"]["inputs"]
    (kept / "prepared/retention.parquet").unlink()
    assert "done already" not in prepare("kept", "data.validation=6", f"data.retention={file}")[1]
    assert len(sources(kept, "retention")) == 4


@pytest.mark.parametrize("key", ["data.retention", "data.validation_trial", "data.validation"])
def test_a_file_without_a_row_that_can_be_used_is_refused_each_time(prepare, tmp_path, key):
    file = write_rows(tmp_path / "empty.jsonl", [{"prompt": "a", "completion": ""}] * 4)
    for _ in range(2):
        _, err = prepare("r", f"{key}={file}", status=1)
        assert f"{key}={file}: none of its 4 rows has a response token" in err.splitlines()[-1]


@pytest.mark.parametrize("value", ["3", "true", "[]", "''"])
def test_rows_that_should_not_be_forgotten_are_files(alphatoken, tmp_path, policy, train_file, value):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}"]
    status, _, err = alphatoken("prepare", *same, *SMALL, f"data.retention={value}")
    assert status == 2 and "must be a file, a glob, a directory, a hub id, or null" in err.splitlines()[-1]
    status, _, err = alphatoken("prepare", *same, *SMALL, f"data.retention={tmp_path}/none.jsonl")
    assert status == 2 and "data.retention" in err.splitlines()[-1]


@pytest.fixture
def prepare_pairs(alphatoken, tmp_path, policy, pairs_file):
    def make(name: str, *more: str, status: int = 0) -> tuple[Path, str]:
        run = tmp_path / name
        found, _, err = alphatoken(
            "prepare", f"run.dir={run}", f"model.policy={policy}", f"data.train={pairs_file}", *SMALL, *more
        )
        assert found == status, err
        return run, err

    return make


def chosen_of(run: Path, name: str) -> list[tuple[list[int], list[int]]]:
    rows = branches_of(table(run, name))
    half = len(rows) // 2
    return list(zip(rows.input_ids[:half], rows.labels[:half], strict=True))


def test_pairs_that_are_kept_for_a_trial_are_pairs_and_validation_rows_are_their_chosen_branches(prepare_pairs):
    plain, _ = prepare_pairs("plain", "data.validation=10")
    cut, _ = prepare_pairs("cut", "data.validation=10", "data.validation_trial=half")
    for run, name, rows in ((plain, "validation_pairs", 10), (cut, "trial", 5)):
        assert table(run, name).schema.equals(PREFERENCE_PREPARED) and table(run, name).num_rows == rows
        assert counts(run)[f"{name}_rows"] == rows
        assert table(run, "validation").schema.equals(PREPARED) and table(run, "fisher").schema.equals(PREPARED)
    assert not (plain / "prepared/trial.parquet").exists() and not (cut / "prepared/validation_pairs.parquet").exists()
    held_out = sequences_of(table(plain, "validation"))
    assert chosen_of(plain, "validation_pairs") == list(zip(held_out.input_ids, held_out.labels, strict=True))
    assert counts(plain)["validation_rows"] == 10 and counts(plain).get("truncated", 0) == 0
    assert sorted(sources(cut, "validation") + sources(cut, "trial")) == sorted(sources(plain, "validation"))
    assert sources(cut, "part-00000-of-00002") == sources(plain, "part-00000-of-00002")


def test_a_trial_of_pairs_takes_files_of_pairs_alone(prepare_pairs, tmp_path):
    both = write_rows(tmp_path / "both.jsonl", [pair_row(90), chat_row(3), pair_row(91)])
    run, _ = prepare_pairs("r", "data.validation=6", f"data.validation_trial={both}")
    assert table(run, "trial").num_rows == 2 and counts(run)["reasons"] == {"trial not_a_pair": 1}
    assert not (run / "prepared/validation_pairs.parquet").exists()
    none = write_rows(tmp_path / "none.jsonl", [chat_row(3)])
    _, err = prepare_pairs("s", "data.validation=6", f"data.validation_trial={none}", status=1)
    assert "data.validation_trial" in err.splitlines()[-1] and "none of its 1 rows is a pair" in err.splitlines()[-1]

"""What a stage depends on, and nothing else: changes are refused with the keys, old and new, or cost nothing."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import SMALL, chat_row, write_rows
from tests.jobs.test_run import hashes


def results(run: Path) -> dict[str, str]:
    """File -> sha256, without the report: it shows all masks, so that it changes with each."""
    return {name: value for name, value in hashes(run).items() if not name.startswith("report/")}


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_cluster, policy, reference):
    from alphatoken.jobs.cli import main

    place = tmp_path_factory.mktemp("mismatch")
    train = write_rows(place / "train.jsonl", [chat_row(i) for i in range(30)])
    same = [f"run.dir={place}/run", f"model.policy={policy}", f"model.reference={reference}", f"data.train={train}",
            *SMALL, "data.validation=4"]  # fmt: skip
    assert main(["run", *same]) == 0
    return place / "run", same, train


@pytest.mark.parametrize(
    ("change", "stage", "key"),
    [
        ("data.max_length=40", "prepare", "data.max_length was 2048, now 40"),
        ("data.shard_examples=7", "prepare", "data.shard_examples was 10, now 7"),
        ("run.seed=3", "prepare", "run.seed was 0, now 3"),
        ("anchor.fisher.max_new_tokens=7", "anchor", "anchor.fisher.max_new_tokens was 6, now 7"),
        ("model.dtype=bfloat16", "anchor", "model.dtype was auto, now bfloat16"),
        ("valuation.window=2", "value", "valuation.window was 4, now 2"),
        ("mask.rho=0.25", "mask/default", "mask.rho was 0.5, now 0.25"),
    ],
)
def test_another_setting_is_refused_by_the_first_stage_that_depends_on_it(alphatoken, run, change, stage, key):
    directory, same, _ = run
    before = results(directory)
    status, _, err = alphatoken("run", *same, change)
    assert status == 2
    told = err.strip().splitlines()
    assert any(f"{stage}: " in line and key in line for line in told), err
    assert "run.overwrite=" in told[-1]
    assert results(directory) == before


@pytest.mark.parametrize(("change", "first"), [("model.dtype=bfloat16", "anchor"), ("model.revision=other", "prepare")])
def test_values_are_made_with_the_model_that_the_anchors_were_made_with(alphatoken, run, change, first):
    directory, same, _ = run
    before = results(directory)
    status, _, err = alphatoken("value", *same, change)
    assert status == 2 and f"{change}, but the anchors were made with" in err and f"run.overwrite={first}`" in err
    assert results(directory) == before


@pytest.mark.parametrize(
    "change",
    ["mask.name=other", "cluster.workers=2", "cluster.shard_timeout=99", "debug=true", "model.attention=eager"],
)
def test_what_changes_no_file_is_not_refused(alphatoken, run, change):
    directory, same, _ = run
    status, _, err = alphatoken("run", *same, change)
    assert status == 0, err
    assert all(f"{stage}: done already" in err for stage in ("prepare", "anchor", "value"))


def test_a_changed_mask_setting_under_another_name_leaves_the_values(alphatoken, run):
    directory, same, _ = run
    before = results(directory)
    status, _, err = alphatoken("run", *same, "mask.rho=0.25", "mask.name=quarter", "mask.stability_weight=0")
    assert status == 0 and "value: done already" in err
    assert {k: v for k, v in results(directory).items() if k in before} == before


def test_changed_data_are_refused_and_moved_data_are_not(alphatoken, run, tmp_path):
    directory, same, train = run
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(train.read_bytes())
    status, _, err = alphatoken("run", *same, f"data.train={moved}")
    assert status == 0, err
    moved.write_bytes(train.read_bytes() + (json.dumps(chat_row(99)) + "\n").encode())
    status, _, err = alphatoken("run", *same, f"data.train={moved}")
    assert status == 2 and "data.train was" in err
    (line,) = [line for line in err.splitlines() if "data.train was" in line]
    size, more = train.stat().st_size, moved.stat().st_size
    assert f"data.train was {train} ({size:,} bytes, 20" in line and f"now {moved} ({more:,} bytes, 20" in line
    assert f"--from {directory}/run.json starts from its own settings" in err.strip().splitlines()[-1]


def test_files_that_look_alike_from_outside_are_told_apart_by_their_content(alphatoken, run, tmp_path):
    directory, same, train = run
    status, before = train.stat(), train.read_bytes()
    try:
        train.write_bytes(before.replace(b"fox", b"oak"))
        os.utime(train, (status.st_atime, status.st_mtime))
        code, _, err = alphatoken("run", *same)
    finally:
        train.write_bytes(before)
        os.utime(train, (status.st_atime, status.st_mtime))
    (line,) = [line for line in err.splitlines() if "data.train was" in line]
    was, now = line.split(" was ")[1].split(", now ")
    assert code == 2 and was.partition(", content ")[0] == now.partition(", content ")[0]
    assert was.partition(", content ")[2] != now.partition(", content ")[2] and "content" in was


def test_another_model_is_named_with_its_place(alphatoken, run, policy, reference):
    directory, same, _ = run
    others = [f"model.policy={reference}" if one.startswith("model.policy") else one for one in same]
    status, _, err = alphatoken("run", *others)
    assert status == 2 and f"anchor: policy was {policy} (" in err and f"now {reference} (" in err, err


def test_a_part_that_is_gone_or_cut_off_is_done_again_though_its_stage_was_done(alphatoken, run):
    directory, same, _ = run
    before = results(directory)
    (directory / "prepared/part-00000-of-00003.parquet").unlink()
    (directory / "anchors/snapshot-00/stability.safetensors").unlink()
    for name in ("prepared/fisher.parquet", "values/part-00001-of-00003.parquet", "anchors/fisher.safetensors",
                 "masks/default/data/train-00002-of-00003.parquet"):  # fmt: skip
        (directory / name).write_bytes((directory / name).read_bytes()[:-20])
    garbage = directory / "values/part-00000-of-00003.parquet"  # in the footer, between its end and the magic bytes
    garbage.write_bytes(garbage.read_bytes()[:-40] + b"\xff" * 32 + garbage.read_bytes()[-8:])
    status, _, err = alphatoken("run", *same)
    assert status == 0, err
    assert results(directory) == before


def test_a_start_anew_that_is_interrupted_is_finished_by_the_next_command(alphatoken, run, monkeypatch):
    directory, same, _ = run
    from alphatoken.pipeline.run.storage import Storage

    before = results(directory)

    def killed(self, name):
        if name == "masks":
            raise KeyboardInterrupt
        remove(self, name)

    remove = Storage.remove
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove", killed)
        assert alphatoken("run", *same, "run.overwrite=value")[0] == 130
    manifest = json.loads((directory / "run.json").read_text())
    assert manifest["removing"] == ["values", "reference", "masks", "trial"] and set(manifest["stages"]) == {
        "prepare",
        "anchor",
    }
    status, _, err = alphatoken("run", *same)
    assert status == 0, err
    after = results(directory)
    assert after == {
        name: value for name, value in before.items() if not name.startswith("masks/") or "/default/" in name
    }


def test_a_manifest_that_cannot_be_read_is_named(alphatoken, tmp_path, policy, train_file):
    (tmp_path / "run.json").write_text('{"schema": 1, "stages"')
    status, _, err = alphatoken("prepare", f"run.dir={tmp_path}", f"model.policy={policy}", f"data.train={train_file}")
    assert status == 1 and "run.json cannot be gone on with (JSONDecodeError" in err and "choose another run.dir" in err

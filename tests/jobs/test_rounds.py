"""Rounds: value a part of the data, train on it, value the next part with the new checkpoint."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from alphatoken.jobs.replay import recorded_configuration
from alphatoken.pipeline.maths.batch import collate
from alphatoken.pipeline.prepare.draw import part_of
from tests.conftest import PREFERENCE, SMALL
from tests.jobs.test_run import hashes

HELD = ("validation.parquet", "fisher.parquet")


def prepared(run: Path) -> list[dict]:
    return [row for file in sorted((run / "prepared").glob("part-*")) for row in pq.read_table(file).to_pylist()]


def test_parts_are_disjoint_and_cover_all_whatever_their_number():
    rows = [3 * i for i in range(101)]
    for parts in (1, 2, 7, 101):
        cut = [part_of(rows, 5, index, parts) for index in range(parts)]
        assert sorted(row for part in cut for row in part) == rows
        assert all(part == sorted(part) for part in cut)
        assert max(map(len, cut)) - min(map(len, cut)) <= 1
    assert part_of(rows, 5, 0, 2) != part_of(rows, 6, 0, 2) and part_of(rows, 5, 0, 2) != rows[:50]


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_parts_of_the_data_are_disjoint_cover_it_and_share_what_is_held_out(
    alphatoken, tmp_path, policy, train_file, pairs_file, kind
):
    data, held = (train_file, ["data.validation=6"]) if kind == "sft" else (pairs_file, PREFERENCE)
    for name, more in (("whole", []), ("1", ["data.part=1/3"]), ("2", ["data.part=2/3"]), ("3", ["data.part=3/3"])):
        same = [f"run.dir={tmp_path}/{name}", f"model.policy={policy}", f"data.train={data}", *SMALL, *held, *more]
        status, _, err = alphatoken("prepare", *same)
        assert status == 0, err
    whole, *parts = [prepared(tmp_path / name) for name in ("whole", "1", "2", "3")]
    assert sum(map(len, parts)) == len(whole) and all(part for part in parts)
    key = lambda row: int(row["source"].rpartition(":")[2])  # noqa: E731
    assert sorted((row for part in parts for row in part), key=key) == sorted(whole, key=key)
    for name in HELD:
        tables = [pq.read_table(tmp_path / run / "prepared" / name) for run in ("whole", "1", "2", "3")]
        assert all(table.equals(tables[0]) for table in tables)
    counts = json.loads((tmp_path / "2/run.json").read_text())["stages"]["prepare"]["counts"]
    assert counts["rows_in"] == counts["rows_used"] == len(parts[1]) + counts["validation_rows"] + counts["fisher_rows"]


def train_on(mask: Path, base: Path, place: Path, steps: int = 12) -> tuple[float, float]:
    """A plain fine-tune on a mask's labels, saved as a checkpoint; returns the loss before and after it."""
    model, rows = AutoModelForCausalLM.from_pretrained(base), []
    for file in sorted(mask.glob("data/*.parquet")):
        rows += pq.read_table(file).to_pylist()
    batch = collate([row["input_ids"] for row in rows], [row["labels"] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(place)
    for file in base.iterdir():  # as they are: a tokenizer that is saved anew may have other bytes
        if file.name not in {p.name for p in place.iterdir()}:
            shutil.copy(file, place / file.name)
    return losses[0], losses[-1]


def test_two_rounds_with_training_in_between(alphatoken, tmp_path, policy, train_file):
    same = [f"data.train={train_file}", "data.validation=6", *SMALL]
    first, second, checkpoint = tmp_path / "round-1", tmp_path / "round-2", tmp_path / "checkpoint-1"
    status, _, err = alphatoken("run", f"run.dir={first}", "data.part=1/2", f"model.policy={policy}", *same)
    assert status == 0, err
    before, after = train_on(first / "masks/default", policy, checkpoint)
    assert after < before - 0.5
    again = [f"run.dir={second}", "data.part=2/2", f"model.policy={checkpoint}", f"model.reference={policy}", *same]
    status, _, err = alphatoken("run", *again, f"run.share={first}")
    assert status == 0 and "shared: the Fisher from" in err and "the Fisher is there already" in err, err
    fisher = [run / "anchors/fisher.safetensors" for run in (first, second)]
    assert fisher[0].read_bytes() == fisher[1].read_bytes()
    for name in HELD:
        assert pq.read_table(first / "prepared" / name).equals(pq.read_table(second / "prepared" / name))
    ids = [{row["id"] for row in prepared(run)} for run in (first, second)]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 31
    counts = [json.loads((run / "run.json").read_text())["stages"]["anchor"]["counts"] for run in (first, second)]
    assert counts[0]["drift"] == "warmup" and counts[1]["drift"] == "checkpoint"
    assert counts[1]["snapshot-00"]["stability_norm"] > 0
    losses = [counts[i]["snapshot-00"]["validation_loss"] for i in (0, 1)]
    assert losses[1] < losses[0]  # the round was learned from
    assert "share" not in recorded_configuration(f"{second}/run.json")["run"]  # it speaks of one command
    # Without the Fisher of the first round the second has the same bytes.
    alone = tmp_path / "alone"
    status, _, err = alphatoken("run", f"run.dir={alone}", *again[1:])
    assert status == 0 and "shared" not in err
    found = [{n: s for n, s in hashes(run).items() if not n.startswith("report/")} for run in (second, alone)]
    assert found[0] == found[1]


@pytest.mark.parametrize("wrong", ["0/4", "5/4", "1", "1/0", "a/b", "1/2/3"])
def test_a_part_that_is_none_is_refused(alphatoken, tmp_path, policy, train_file, wrong):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL]
    status, _, err = alphatoken("prepare", *same, f"data.part={wrong}")
    assert status == 2 and f"data.part={wrong}: must be k/n" in err


def test_an_empty_part_and_a_donor_that_is_no_run_are_refused(alphatoken, tmp_path, policy, train_file):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=6"]
    status, _, err = alphatoken("prepare", *same, "data.part=1/500")
    assert status == 2 and "data.part=1/500: 31 training rows are too few" in err
    status, _, err = alphatoken("prepare", *same, f"run.share={tmp_path}/none")
    assert status == 2 and "run.share=" in err


def test_plan_counts_the_part_alone(alphatoken, tmp_path, policy, train_file):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=6"]
    whole, part = (json.loads(alphatoken("plan", "--json", *same, *more)[1]) for more in ([], ["data.part=1/4"]))
    assert part["data"]["train_examples"] == whole["data"]["train_examples"] // 4
    assert part["data"]["fisher_prompts"] == whole["data"]["fisher_prompts"]
    guard = part["flops"]["anchor"]["guard"]  # of a model that is looked at once, whatever the rows
    assert part["flops"]["value"]["flops"] < 0.3 * whole["flops"]["value"]["flops"] + guard

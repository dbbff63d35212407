"""The whole pipeline on a tiny real model: every file of a run, its bytes, and going on where it stopped."""

import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alphatoken import Directions, TokenValuer
from alphatoken.data_schemas import COMPONENTS, PREPARED, SCORES, value_columns, values_schema
from alphatoken.pipeline.maths.batch import collate
from alphatoken.pipeline.settings.mask import LONG_ANSWER
from tests.conftest import SMALL, chat_row, write_rows

COLUMNS = value_columns(list(SCORES))
EVERY_COLUMN = ("valuation.exact=true", "valuation.reference_loss=true")


def arguments(run: Path, policy: Path, train: Path, *more: str) -> list[str]:
    return ["run", f"run.dir={run}", f"model.policy={policy}", f"data.train={train}", *SMALL, *more]


def hashes(run: Path) -> dict[str, str]:
    """File -> sha256, without the manifest, the metrics and the logs, which have timings."""
    timed = ("run.json", "metrics.jsonl")
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.name not in timed and p.suffix != ".log")
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def done_run(tmp_path_factory, ray_cluster, policy, train_file, validation_file) -> Path:
    """A run with the default scores and mask, warm-up drift and a validation file."""
    from alphatoken.jobs.cli import main

    run = tmp_path_factory.mktemp("run")
    assert main(arguments(run, policy, train_file, f"data.validation={validation_file}")) == 0
    return run


def test_writes_every_file_of_the_contract(done_run):
    parts = [f"part-{i:05d}-of-00004.parquet" for i in range(4)]
    masks = [f"masks/default/data/train-{i:05d}-of-00004.parquet" for i in range(4)]
    expected = [
        "run.json", "metrics.jsonl", "report/index.html", "prepared/validation.parquet", "prepared/fisher.parquet",
        "anchors/fisher.safetensors", "anchors/snapshot-00/adaptation.safetensors", "anchors/snapshot-00/stability.safetensors",
        "anchors/snapshot-00/policy.safetensors", "masks/default/README.md", "masks/default/summary.json", *masks,
        *[f"prepared/{p}" for p in parts], *[f"values/{p}" for p in parts],
    ]  # fmt: skip
    found = {str(p.relative_to(done_run)) for p in done_run.rglob("*") if p.is_file()}
    logs = {name for name in found if name.startswith("logs/")}
    assert found - logs == set(expected) and {name[5:].split("-")[0] for name in logs} == {"prepare", "anchor", "value"}


def test_masks_load_with_exactly_three_columns_and_about_half_kept(done_run, tmp_path):
    rows = datasets.load_dataset(str(done_run / "masks/default"), split="train", cache_dir=str(tmp_path))
    assert rows.column_names == ["input_ids", "attention_mask", "labels"]
    prepared = [
        r for i in range(4) for r in pq.read_table(done_run / f"prepared/part-{i:05d}-of-00004.parquet").to_pylist()
    ]
    response = sum(label != -100 for row in prepared for label in row["labels"])
    kept = sum(label != -100 for row in rows for label in row["labels"])
    always = len(prepared)  # the end-of-turn token of each is always kept
    assert response * 0.5 <= kept <= response * 0.5 + always
    for masked, whole in zip(rows, prepared, strict=True):
        assert masked["input_ids"] == whole["input_ids"]
        assert all(m in (-100, w) for m, w in zip(masked["labels"], whole["labels"], strict=True))
        assert masked["labels"][-1] == -100 or whole["labels"][-1] == masked["labels"][-1]
        response = [i for i, label in enumerate(whole["labels"]) if label != -100]
        # mask.skip_first is 1 with mask.score=information, of answers that are not short.
        assert masked["labels"][response[0]] == -100 or len(response) < LONG_ANSWER


def test_values_line_up_with_prepared_rows_and_equal_the_library(done_run, policy):
    part = "part-00001-of-00004.parquet"
    prepared, values = pq.read_table(done_run / "prepared" / part), pq.read_table(done_run / "values" / part)
    assert prepared.schema.equals(PREPARED) and values.schema.equals(values_schema(COLUMNS))
    assert prepared["id"].to_pylist() == values["id"].to_pylist()
    model = AutoModelForCausalLM.from_pretrained(policy)
    valuer = TokenValuer(model, Directions.load(done_run / "anchors/snapshot-00"), layers=2, window=4)
    rows = prepared.to_pylist()
    batch = collate([r["input_ids"] for r in rows], [r["labels"] for r in rows])
    mask = (torch.arange(batch.shape[1]) < batch.lengths[:, None]).long()
    found = valuer(batch.input_ids, mask, batch.labels)
    assert tuple(found) == COLUMNS
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and tensor.any() and (name in COMPONENTS or (tensor >= 0).all())
        for row, stored in enumerate(values[name].to_pylist()):
            length = len(rows[row]["input_ids"])
            assert len(stored) == length
            np.testing.assert_allclose(stored, tensor[row, :length].numpy(), rtol=2e-4, atol=1e-6)
            outside = [v for v, label in zip(stored, rows[row]["labels"], strict=True) if label == -100]
            assert not any(outside)


def test_loss_and_entropy_are_those_of_the_prediction_of_the_token_at_the_same_index(done_run, policy):
    model = AutoModelForCausalLM.from_pretrained(policy)
    part = "part-00000-of-00004.parquet"
    weights = load_file(done_run / "anchors/snapshot-00/policy.safetensors")
    model.load_state_dict(weights, strict=False)
    for row, stored in zip(
        pq.read_table(done_run / "prepared" / part).to_pylist(),
        pq.read_table(done_run / "values" / part).to_pylist(),
        strict=True,
    ):
        ids = torch.tensor([row["input_ids"]])
        log_probability = model(ids).logits[0].log_softmax(-1)
        for t, label in enumerate(row["labels"]):
            if label != -100:
                expected = -log_probability[t - 1, row["input_ids"][t]].item()
                assert stored["loss"][t] == pytest.approx(expected, rel=1e-4, abs=1e-5)
                undecided = -(log_probability[t - 1].exp() * log_probability[t - 1]).sum().item()
                assert stored["entropy"][t] == pytest.approx(undecided, rel=1e-4, abs=1e-5)


def test_held_out_rows_are_excluded_from_training(alphatoken, tmp_path, policy, train_file):
    assert alphatoken(*arguments(tmp_path / "r", policy, train_file, "data.validation=5")[:], "mask.name=m")[0] == 0
    sources = {}
    for name in ("validation", "fisher", *[f"part-{i:05d}-of-00004" for i in range(4)]):
        sources[name] = set(pq.read_table(tmp_path / f"r/prepared/{name}.parquet")["source"].to_pylist())
    assert len(sources["validation"]) == 5 and len(sources["fisher"]) == 3
    everything = [s for found in sources.values() for s in found]
    assert len(everything) == len(set(everything)) == 40


def test_checkpoint_drift_is_fisher_times_difference(
    alphatoken, tmp_path, policy, reference, train_file, validation_file
):
    run = tmp_path / "r"
    status, out, err = alphatoken(
        *arguments(run, policy, train_file, f"model.reference={reference}", f"data.validation={validation_file}")
    )
    assert status == 0, err
    assert len(out.splitlines()) == 3 and str(run) in out
    assert not (run / "anchors/snapshot-00/policy.safetensors").exists()
    fisher, stability = (
        load_file(run / "anchors/fisher.safetensors"),
        load_file(run / "anchors/snapshot-00/stability.safetensors"),
    )
    there = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    before = AutoModelForCausalLM.from_pretrained(reference).state_dict()
    assert len(stability) == 14
    for name, tensor in stability.items():
        assert fisher[name].min() >= 0 and fisher[name].max() > 0
        torch.testing.assert_close(tensor, fisher[name] * (there[name] - before[name]))
    values = pq.read_table(run / "values/part-00000-of-00004.parquet")
    assert any(v for row in values["stability_direct"].to_pylist() for v in row)


def test_same_bytes_with_one_worker_and_with_two(alphatoken, tmp_path, policy, reference, train_file):
    found = []
    for workers in (1, 2):
        run = tmp_path / "run"  # the same place, since ids name the source files
        more = (f"model.reference={reference}", f"cluster.workers={workers}", "data.validation=6", *EVERY_COLUMN)
        assert alphatoken(*arguments(run, policy, train_file, *more))[0] == 0
        found.append(hashes(run))
        run.rename(tmp_path / f"run-{workers}")
    assert found[0] == found[1] and len(found[0]) > 10
    schema = pq.read_schema(tmp_path / "run-2/values/part-00000-of-00004.parquet")
    assert schema.equals(values_schema((*COLUMNS, "adaptation_exact", "stability_exact", "reference_loss")))
    mask = json.loads((tmp_path / "run-2/run.json").read_text())["configuration"]["mask"]
    assert (mask["score"], mask["stability_weight"], mask["skip_first"]) == ("information", 0.0, 1)


def test_the_same_command_again_skips_everything_and_another_setting_is_refused(
    alphatoken, done_run, policy, train_file, validation_file
):
    same = arguments(done_run, policy, train_file, f"data.validation={validation_file}")
    before = hashes(done_run)
    status, _, err = alphatoken(*same)
    assert status == 0 and err.count("done already") == 4
    status, _, err = alphatoken(*same, "valuation=paper", "mask.score=paper")
    assert status == 2 and "run.overwrite=value" in err
    assert "value: columns was [..., 'information', 'entropy', 'gradient_norm'], now [...]" in err
    status, _, err = alphatoken(*same, "valuation.window=5")
    assert status == 2 and "valuation.window was 4, now 5" in err and "run.overwrite=value" in err
    status, _, err = alphatoken(*same, "mask.rho=0.3")
    assert status == 2 and "mask.name" in err
    assert hashes(done_run) == before


def test_another_rho_needs_no_model(alphatoken, done_run):
    status, out, _ = alphatoken(
        "mask", f"run.dir={done_run}", "mask.rho=0.25", "mask.name=quarter", "mask.always_keep=[]", "mask.min_kept=0"
    )
    assert status == 0 and len(out.splitlines()) == 3
    own = "'mask.always_keep=[]' mask.min_kept=0"
    assert out.splitlines()[-1] == f"next:  alphatoken mask run.dir={done_run} {own} mask.rho=0.3 mask.name=rho-0.3"
    summary = json.loads((done_run / "masks/quarter/summary.json").read_text())
    assert summary["kept_fraction"] == pytest.approx(0.25, abs=0.01)


def test_value_goes_on_with_the_parts_that_are_missing(alphatoken, tmp_path, policy, reference, train_file):
    run = tmp_path / "r"
    same = arguments(run, policy, train_file, f"model.reference={reference}", "data.validation=6", *EVERY_COLUMN)
    assert alphatoken(*same)[0] == 0
    before = hashes(run)
    part = run / "values/part-00001-of-00004.parquet"
    part.write_bytes(part.read_bytes()[:100])  # as a broken disk would leave it
    (run / "reference/part-00003-of-00004.parquet").unlink()
    manifest = json.loads((run / "run.json").read_text())
    manifest["stages"]["value"]["state"] = "running"
    (run / "run.json").write_text(json.dumps(manifest))
    status, _, err = alphatoken("value", *same[1:])
    assert status == 0 and "3 of 4 shards are complete already" in err, err
    assert hashes(run) == before


def test_overwrite_starts_a_stage_and_the_later_ones_anew(alphatoken, tmp_path, policy, reference, train_file):
    run = tmp_path / "r"
    same = arguments(run, policy, train_file, f"model.reference={reference}", "data.validation=6")
    assert alphatoken(*same)[0] == 0
    status, _, err = alphatoken(*same, "valuation.window=0", "run.overwrite=value")
    assert status == 0, err
    assert "anchor: done already" in err
    values = pq.read_table(run / "values/part-00000-of-00004.parquet")
    assert not any(v for row in values["adaptation_causal"].to_pylist() for v in row)


def test_broken_rows_go_to_quarantine_and_are_counted(alphatoken, tmp_path, policy, validation_file):
    bad = [
        '{"messages": [',
        "[1, 2]",
        {"messages": "x"},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"other": 1},
    ]
    train = write_rows(tmp_path / "bad.jsonl", [*bad[:2], *[chat_row(i) for i in range(12)], *bad[2:]])
    run = tmp_path / "r"
    status, _, err = alphatoken("prepare", *arguments(run, policy, train, f"data.validation={validation_file}")[1:])
    assert status == 0, err
    counts = json.loads((run / "run.json").read_text())["stages"]["prepare"]["counts"]
    assert counts["quarantined"] == 5 and counts["train_rows"] + counts["fisher_rows"] == 12
    rejected = [row for p in sorted((run / "quarantine").glob("*")) for row in pq.read_table(p).to_pylist()]
    assert sorted(row["row"] for row in rejected) == [0, 1, 14, 15, 16]
    assert all(row["file"] == str(train) and ":" in row["reason"] for row in rejected)
    assert json.loads(next(row["raw"] for row in rejected if row["row"] == 16)) == {"other": 1}

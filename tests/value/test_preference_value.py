"""Values of preference pairs against an independent computation: full attention, float64, every pair one by one."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alphatoken.data_schemas import (
    COMPONENTS,
    PREFERENCE_PREPARED,
    PREFERENCE_REFERENCE,
    PREPARED,
    SCORES,
    preference_values_schema,
    value_columns,
)
from tests.conftest import PREFERENCE, SMALL, chat_row, pair_row, write_rows
from tests.maths import pairwise
from tests.maths.tiny_models import LLAMA

BETA = 0.3  # as in PREFERENCE
LAYERS, WINDOW = 2, 4  # as in SMALL
COLUMNS = value_columns(list(SCORES))


def run(directory: Path, policy: Path, pairs: Path, *more: str) -> Path:
    from alphatoken.jobs.cli import main

    stages = ("prepare", "anchor", "value")
    arguments = [f"run.dir={directory}", f"model.policy={policy}", f"data.train={pairs}", *SMALL, *more]
    assert [main([stage, *arguments]) for stage in stages] == [0, 0, 0]
    return directory


def table(place: Path, name: str):
    return pq.read_table(sorted((place / name).glob("part-*.parquet"))[0])


@pytest.fixture(scope="module")
def one_model(tmp_path_factory, ray_cluster, policy, pairs_file) -> Path:
    """Policy and reference are one model, the drift is a warm-up; two snapshots of it are valued."""
    more = ("data.validation=5", "anchor.snapshots=2", "anchor.drift=warmup", "anchor.warmup.learning_rate=0.01")
    return run(tmp_path_factory.mktemp("pairs"), policy, pairs_file, *more)


def response_logps(model, ids: list[int], labels: list[int]) -> list[float]:
    """Log-probability of each response token, 0.0 elsewhere, by the model's own forward in float64."""
    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logps[t - 1, ids[t]].item() if labels[t] != -100 else 0.0 for t in range(len(ids))]


def test_files_have_the_columns_and_sizes_of_the_contract(preference_run):
    for name, schema in (
        ("prepared", PREFERENCE_PREPARED), ("values", preference_values_schema(COLUMNS)),
        ("reference", PREFERENCE_REFERENCE),
    ):  # fmt: skip
        assert table(preference_run, name).schema.equals(schema)
        assert table(preference_run, name)["id"].to_pylist() == table(preference_run, "prepared")["id"].to_pylist()
    assert pq.read_schema(preference_run / "prepared/validation.parquet").equals(PREPARED)
    counts = json.loads((preference_run / "run.json").read_text())["stages"]["prepare"]["counts"]
    assert counts["format"] == "preference" and counts["rows_in"] == 30 == counts["rows_used"]
    assert counts["train_rows"] + counts["validation_rows"] + counts["fisher_rows"] == 30


@torch.no_grad()
def test_omega_and_the_reference_against_whole_models(preference_run, policy, reference):
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in (policy, reference)]
    prepared, values, stored = (table(preference_run, name).to_pylist() for name in ("prepared", "values", "reference"))
    assert len({row["omega"] for row in values}) > 1
    for pair, value, ref in zip(prepared, values, stored, strict=True):
        sums = {}
        for branch in ("chosen", "rejected"):
            ids, labels = pair[f"{branch}_input_ids"], pair[f"{branch}_labels"]
            own, theirs = (response_logps(model, ids, labels) for model in models)
            np.testing.assert_allclose(ref[f"{branch}_logps"], theirs, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(value[f"{branch}_loss"], [-x for x in own], rtol=1e-4, atol=1e-5)
            sums[branch] = sum(own) - sum(theirs)
        s = BETA * (sums["chosen"] - sums["rejected"])
        assert value["omega"] == pytest.approx(BETA / (1 + np.exp(s)), rel=1e-4)


def test_both_branches_are_the_pairwise_definition_with_signs_and_scales_where_a_step_has_them(preference_run, policy):
    twin = pairwise.oracle(AutoModelForCausalLM.from_pretrained(policy))
    held_out = pq.read_table(preference_run / "prepared/validation.parquet").to_pylist()
    against = [pairwise.record(twin, LLAMA, LAYERS, row["input_ids"], row["labels"]) for row in held_out]
    adaptation = pairwise.adaptation(against)
    stability = load_file(preference_run / "anchors/snapshot-00/stability.safetensors")
    drift = {(name, 0): tensor.double() for name, tensor in stability.items()}
    prepared, values = (
        table(preference_run, "prepared").to_pylist()[:3],
        table(preference_run, "values").to_pylist()[:3],
    )
    expected: dict[str, list[float]] = {name: [] for name in COLUMNS}
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for pair, value in zip(prepared, values, strict=True):
        for branch, sign in (("chosen", 1), ("rejected", -1)):
            ids, labels = pair[f"{branch}_input_ids"], pair[f"{branch}_labels"]
            recorded = pairwise.record(twin, LLAMA, LAYERS, ids, labels)
            positions = pairwise.position_values(twin.config, LLAMA, recorded, against, drift, WINDOW)
            moved = pairwise.moved_logits(twin, LLAMA, LAYERS, ids, adaptation)
            positions |= pairwise.prediction_values(recorded, moved)
            tokens = pairwise.token_values(positions, recorded)
            factors = dict.fromkeys(COMPONENTS, sign * value["omega"]) | {"gradient_norm": value["omega"]}
            for name in COLUMNS:
                expected[name] += (factors.get(name, 1.0) * tokens[name]).tolist()
                found[name] += value[f"{branch}_{name}"]
                outside = [v for v, label in zip(value[f"{branch}_{name}"], labels, strict=True) if label == -100]
                assert not any(outside)
    for name in COLUMNS:
        scale = max(map(abs, expected[name]))
        assert scale > 0
        np.testing.assert_allclose(np.array(found[name]) / scale, np.array(expected[name]) / scale, atol=1e-5)


@torch.no_grad()
def test_with_one_model_the_margin_is_zero_and_no_reference_runs(one_model, policy):
    omega = table(one_model, "values")["omega"].to_pylist()
    assert set(omega) == {np.float32(0.05)}
    counts = json.loads((one_model / "run.json").read_text())["stages"]["value"]["counts"]
    assert "reference" not in counts
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64)
    moved = False
    for pair, ref, value in zip(
        *(table(one_model, name).to_pylist() for name in ("prepared", "reference", "values")), strict=True
    ):
        for branch in ("chosen", "rejected"):
            own = response_logps(model, pair[f"{branch}_input_ids"], pair[f"{branch}_labels"])
            np.testing.assert_allclose(ref[f"{branch}_logps"], own, rtol=1e-4, atol=1e-5)
            moved |= not np.allclose(value[f"{branch}_loss"], [-x for x in own], rtol=1e-3)
    assert moved, "the snapshots' losses are those of the model before the warm-up: the test cannot tell them apart"


def test_a_validation_file_may_hold_supervised_rows_or_pairs(alphatoken, tmp_path, policy, pairs_file):
    rows = [chat_row(500), pair_row(501), {**pair_row(502), "rejected": pair_row(502)["chosen"]}]
    validation = write_rows(tmp_path / "validation.jsonl", rows)
    arguments = [f"model.policy={policy}", f"data.train={pairs_file}", *SMALL, f"data.validation={validation}"]
    status, _, err = alphatoken("prepare", f"run.dir={tmp_path}/r", *arguments)
    assert status == 0, err
    held_out = pq.read_table(tmp_path / "r/prepared/validation.parquet").to_pylist()
    assert [row["source"].rpartition(":")[2] for row in held_out] == ["0", "1"]
    (refused,) = pq.read_table(tmp_path / "r/quarantine/validation.parquet").to_pylist()
    assert refused["row"] == 2 and refused["reason"].startswith("identical_branches: ")


def test_pairs_that_cannot_be_used_are_in_quarantine_and_all_rows_are_accounted_for(alphatoken, tmp_path, policy):
    same = {**pair_row(1), "rejected": pair_row(1)["chosen"]}
    empty = {**pair_row(2), "chosen": [{"role": "assistant", "content": " "}]}
    rows = [pair_row(0), same, empty, chat_row(3), '{"prompt"', *[pair_row(i) for i in range(4, 20)]]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    arguments = [f"model.policy={policy}", f"data.train={pairs}", *SMALL, "data.validation=4"]
    status, _, err = alphatoken("prepare", f"run.dir={tmp_path}/r", *arguments)
    assert status == 0, err
    refused = [row for p in sorted((tmp_path / "r/quarantine").glob("*")) for row in pq.read_table(p).to_pylist()]
    reasons = {row["row"]: row["reason"].partition(":")[0] for row in refused}
    assert reasons == {1: "identical_branches", 2: "empty_branch", 3: "not_a_pair", 4: "broken_json"}
    counts = json.loads((tmp_path / "r/run.json").read_text())["stages"]["prepare"]["counts"]
    assert counts["rows_in"] == 21 == counts["rows_used"] + counts["quarantined"]
    assert counts["train_rows"] + counts["validation_rows"] + counts["fisher_rows"] == counts["rows_used"]


def test_files_of_both_kinds_are_refused_unless_the_format_is_named(
    alphatoken, tmp_path, policy, pairs_file, train_file
):
    arguments = [f"model.policy={policy}", f"data.train=[{pairs_file},{train_file}]", *SMALL, "data.validation=4"]
    status, _, err = alphatoken("prepare", f"run.dir={tmp_path}/r", *arguments)
    assert status == 2 and "data.format" in err and str(train_file) in err
    status, _, err = alphatoken("prepare", f"run.dir={tmp_path}/s", *arguments, "data.format=preference")
    assert status == 0 and "not_a_pair: 40" in err, err


def test_value_goes_on_where_a_reference_part_is_missing(alphatoken, preference_run, policy, reference, pairs_file):
    files = [sorted((preference_run / name).glob("part-*.parquet"))[1] for name in ("values", "reference")]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    manifest = json.loads((preference_run / "run.json").read_text())
    manifest["stages"]["value"]["state"] = "running"
    (preference_run / "run.json").write_text(json.dumps(manifest))
    asked = [
        "value", f"run.dir={preference_run}", f"model.policy={policy}", f"model.reference={reference}",
        f"data.train={pairs_file}", *SMALL, *PREFERENCE,
    ]  # fmt: skip
    status, _, err = alphatoken(*asked)
    assert status == 0 and "2 of 3 shards are complete already" in err, err
    assert [file.read_bytes() for file in files] == before
    files[1].unlink()  # of a finished stage, and of the reference alone
    status, _, err = alphatoken("mask", f"run.dir={preference_run}", "mask.name=other")
    assert status == 1 and f"reference/{files[1].name} is missing" in err and "run.overwrite" not in err, err
    status, _, err = alphatoken(*asked)
    assert status == 0 and "3 of 3 shards are complete already" in err, err
    assert [file.read_bytes() for file in files] == before and alphatoken(*asked)[2].count("value: done already") == 1

"""Preconditioned directions, several snapshots and their scales, through the command line on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alphatoken import Directions, TokenValuer
from alphatoken.data_schemas import SCORES, value_columns
from alphatoken.pipeline.maths.batch import collate
from tests.conftest import SMALL

COLUMNS = value_columns(list(SCORES), exact=True)
SNAPSHOTS = ("anchor.snapshots=3", "anchor.warmup.learning_rate=0.01")


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_cluster, policy, train_file, validation_file):
    """Run the stages up to value with overrides, once per set of them."""
    from alphatoken.jobs.cli import main

    runs: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in runs:
            run = tmp_path_factory.mktemp("directions")
            common = [f"run.dir={run}", f"model.policy={policy}", f"data.train={train_file}", *SMALL]
            common += [f"data.validation={validation_file}", "data.shard_examples=40", *overrides]
            for stage in ("prepare", "anchor", "value"):
                assert main([stage, *common]) == 0
            runs[overrides] = run
        return runs[overrides]

    return make


def prepared(run: Path) -> list[dict]:
    return [row for file in sorted((run / "prepared").glob("part-*")) for row in pq.read_table(file).to_pylist()]


def values(run: Path) -> dict[str, np.ndarray]:
    """Column -> all response tokens' values."""
    rows = prepared(run)
    stored = [row for file in sorted((run / "values").glob("part-*")) for row in pq.read_table(file).to_pylist()]
    response = [np.array(row["labels"]) != -100 for row in rows]
    return {
        name: np.concatenate([np.array(row[name])[r] for row, r in zip(stored, response, strict=True)])
        for name in stored[0].keys() - {"id"}
    }


def alone(run: Path, policy: Path, index: int) -> dict[str, np.ndarray]:
    """One snapshot by itself, through the library."""
    model, rows = AutoModelForCausalLM.from_pretrained(policy), prepared(run)
    valuer = TokenValuer(model, Directions.load(run / f"anchors/snapshot-{index:02d}"), layers=2, window=4, exact=True)
    batch = collate([r["input_ids"] for r in rows], [r["labels"] for r in rows])
    found = valuer.value(batch)
    return {name: found[name][batch.labels != -100].numpy() for name in COLUMNS}


def test_values_are_the_mean_over_snapshots_that_are_each_run_alone(made, policy):
    run = made(*SNAPSHOTS, "valuation.exact=true")
    single, mean = [alone(run, policy, index) for index in range(3)], values(run)
    assert mean.keys() == set(COLUMNS)
    for name in COLUMNS:
        wanted = np.mean([one[name] for one in single], axis=0)
        np.testing.assert_allclose(mean[name], wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
        assert not np.allclose(mean[name], single[0][name], rtol=0.05)


def test_snapshots_go_from_the_start_of_the_warm_up_to_its_end(made, policy):
    run = made(*SNAPSHOTS)
    weights = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    first, last = (load_file(run / f"anchors/snapshot-{i:02d}/policy.safetensors") for i in (0, 2))
    assert all(torch.equal(weights[name], tensor) for name, tensor in first.items())
    assert not any(torch.equal(weights[name], tensor) for name, tensor in last.items())
    counts = json.loads((run / "run.json").read_text())["stages"]["anchor"]["counts"]
    assert counts["snapshot-00"]["stability_norm"] == 0 < counts["snapshot-02"]["stability_norm"]


def test_scaled_snapshots_are_divided_by_their_root_mean_square(made):
    plain = made(*SNAPSHOTS)
    scaled = made(*SNAPSHOTS, "anchor.snapshot_scale=rms", "anchor.warmup.examples=40")
    counts = json.loads((scaled / "run.json").read_text())["stages"]["anchor"]["counts"]
    for name in ("adaptation", "stability"):
        for index in range(3):
            scale = counts[f"snapshot-{index:02d}"][f"{name}_scale"]
            directory = f"anchors/snapshot-{index:02d}/{name}.safetensors"
            direction = load_file(scaled / directory)
            assert scale > 0 and all(bool(torch.isfinite(t).all()) for t in direction.values())
            if index == 0:  # the same weights in both runs
                for key, tensor in load_file(plain / directory).items():
                    torch.testing.assert_close(direction[key] * scale, tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("more", [[], ["valuation.scores=[information]"]], ids=["all", "information"])
def test_the_scale_is_that_of_the_papers_values_over_the_sample_whatever_is_valued(made, policy, more):
    """All training rows are the sample here, so each scaled snapshot has root mean square one over the data set."""
    run = made("anchor.snapshot_scale=rms", "anchor.warmup.examples=40", "anchor.warmup.steps=2", *more)
    found = alone(run, policy, 0)
    for name in ("adaptation", "stability"):
        total = found[f"{name}_direct"].astype(np.float64) + found[f"{name}_causal"]
        assert np.sqrt(np.mean(total**2)) == pytest.approx(1.0, rel=1e-3)
    stored = values(run)
    assert stored.keys() == (set(value_columns(["information"])) if more else set(value_columns(list(SCORES))))
    for name, column in stored.items():
        np.testing.assert_allclose(column, found[name], rtol=1e-3, atol=1e-5 * np.abs(column).max())


@pytest.mark.parametrize("kind", ["adam", "kfac"])
def test_both_directions_are_preconditioned(made, kind):
    plain, moved = made(), made(f"anchor.precondition={kind}", "anchor.damping=0.2")
    fisher = load_file(plain / "anchors/fisher.safetensors")
    again = load_file(moved / "anchors/fisher.safetensors")
    for name in ("adaptation", "stability"):
        before = load_file(plain / f"anchors/snapshot-00/{name}.safetensors")
        after = load_file(moved / f"anchors/snapshot-00/{name}.safetensors")
        for key, tensor in before.items():
            assert torch.equal(fisher[key], again[key])
            if kind == "adam":
                root = fisher[key].sqrt()
                torch.testing.assert_close(after[key], tensor / (root + 0.2 * root.mean()), rtol=1e-4, atol=1e-6)
            else:  # the curvature is positive: the preconditioned direction still points the same way
                cosine = torch.nn.functional.cosine_similarity(after[key].flatten(), tensor.flatten(), dim=0)
                assert 0 < float(cosine) < 0.999


def test_preconditioning_without_a_drift_needs_a_fisher_and_makes_one(made):
    run = made("anchor.drift=none", "mask.stability_weight=0", "anchor.precondition=kfac")
    assert (run / "anchors/fisher.safetensors").exists()
    found = values(run)
    assert found["adaptation_direct"].any() and not found["stability_direct"].any()


def test_the_default_keeps_half_and_no_first_token_of_answers_that_are_not_short(alphatoken, made):
    run = made("anchor.drift=none")
    assert (values(run)["information"] > 0).all() and not values(run)["stability_direct"].any()
    status, out, err = alphatoken("mask", f"run.dir={run}", "mask.always_keep=[]", "mask.skip_first_from=2")
    assert status == 0, err
    masks = [
        row
        for file in sorted((run / "masks/default/data").glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]
    kept = everything = 0
    for row, whole in zip(masks, prepared(run), strict=True):
        response = np.flatnonzero(np.array(whole["labels"]) != -100)
        chosen = np.flatnonzero(np.array(row["labels"]) != -100)
        first = response[np.diff(response, prepend=-2) > 1]
        assert not set(first) & set(chosen) or len(response) == len(first)  # min_kept where there are no others
        kept, everything = kept + len(chosen), everything + len(response)
    assert kept == pytest.approx(everything / 2, abs=len(masks))

"""valuation.method through the command line: no anchor, the same files, the same bytes for 1 and 2 workers."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from alphatoken.data_schemas import VALUES
from tests.conftest import SMALL
from tests.jobs.test_run import hashes


def command(run, policy, train, *more):
    return [
        "run",
        f"run.dir={run}",
        f"model.policy={policy}",
        f"data.train={train}",
        *SMALL,
        "data.validation=6",
        *more,
    ]


@pytest.mark.parametrize("method", ["loss", "entropy", "random", "full", "excess_loss"])
def test_a_method_without_directions_skips_anchor_and_masks_as_usual(
    alphatoken, tmp_path, policy, reference, train_file, method
):
    found = []
    for workers in (1, 2) if method in ("random", "excess_loss") else (1,):
        run = tmp_path / "run"
        more = [f"valuation.method={method}", f"cluster.workers={workers}"]
        more += [f"model.reference={reference}"] if method == "excess_loss" else []
        status, _, err = alphatoken(*command(run, policy, train_file, *more))
        assert status == 0, err
        assert f"anchor: skipped, since valuation.method={method}" in err
        found.append(hashes(run))
        run = run.rename(tmp_path / f"run-{workers}")
    assert found[0] == found[-1] and not (run / "anchors").exists()
    parts = sorted((run / "values").glob("*.parquet"))
    assert len(parts) == 4
    scores, losses = [], []
    for part in parts:
        table, prepared = pq.read_table(part), pq.read_table(run / "prepared" / part.name)
        assert table.schema.equals(VALUES) and table["id"].equals(prepared["id"])
        inside = prepared["labels"].combine_chunks().flatten().to_numpy() != -100
        columns = {n: table[n].combine_chunks().flatten().to_numpy() for n in VALUES.names[1:]}
        assert not any(columns[n].any() for n in VALUES.names[2:5])
        assert not columns["adaptation_direct"][~inside].any()
        scores.append(columns["adaptation_direct"][inside])
        losses.append(columns["loss"][inside])
    score, loss = np.concatenate(scores), np.concatenate(losses)
    assert bool(loss.any()) == (method not in ("random", "full")) and bool(score.any()) == (method != "full")
    if method == "loss":
        assert (score == -loss).all()
    summary = json.loads((run / "masks/default/summary.json").read_text())
    assert summary["method"] == method
    assert summary["kept_fraction"] == 1 if method == "full" else 0.5 <= summary["kept_fraction"] < 0.75
    assert f"the method `{method}`" in (run / "masks/default/README.md").read_text()
    arguments = command(run, policy, train_file, *more)[1:]
    plan = json.loads(alphatoken("plan", "--json", *arguments)[1])
    assert plan["resume"]["value"]["state"] == "done", plan["resume"]
    if method in ("random", "full"):
        status, _, err = alphatoken("mask", f"run.dir={run}", "mask.loss_weight=1", "mask.name=m")
        assert status == 2 and "runs no model" in err


def test_excess_loss_of_one_model_is_refused_before_anything_is_prepared(alphatoken, tmp_path, policy, train_file):
    status, _, err = alphatoken(*command(tmp_path / "r", policy, train_file, "valuation.method=excess_loss"))
    assert status == 2 and "model.reference" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r/prepared").exists()


def test_no_drift_is_no_obstacle_and_another_method_in_the_same_run_is_refused(
    alphatoken, tmp_path, policy, train_file
):
    same = command(tmp_path / "r", policy, train_file, "anchor.drift=none")
    status, _, err = alphatoken(*same, "valuation.method=random")
    assert status == 0, err
    status, _, err = alphatoken("value", *same[1:], "valuation.method=loss")
    assert status == 2 and "valuation.method was random, now loss" in err and "run.overwrite=value" in err

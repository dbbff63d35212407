"""The column gradient_norm and mask.divide_by_gradient_norm through the command line."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from alphatoken import Directions, TokenValuer
from alphatoken.data_schemas import COMPONENTS, SCORES, value_columns, values_schema
from alphatoken.pipeline.maths.batch import collate
from alphatoken.pipeline.maths.masking import rank_of
from tests.conftest import SMALL

COLUMNS = value_columns(list(SCORES))


def table(run: Path, kind: str) -> list[dict]:
    return [row for file in sorted((run / kind).glob("*-of-*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_cluster, policy, train_file) -> tuple[Path, list[str]]:
    from alphatoken.jobs.cli import main

    place = tmp_path_factory.mktemp("norms")
    same = [f"run.dir={place}", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=6"]
    same += ["anchor.snapshots=2", "anchor.drift=warmup", "anchor.warmup.learning_rate=0.01"]
    own = ["mask.score=paper", "mask.divide_by_gradient_norm=true", "mask.always_keep=[]", "mask.min_kept=0"]
    assert main(["run", *same, *own]) == 0
    return place, same


def test_the_column_is_the_mean_over_snapshots_of_the_librarys(run, policy):
    place, _ = run
    rows, found = table(place, "prepared"), table(place, "values")
    assert pq.read_schema(sorted((place / "values").glob("*.parquet"))[0]).equals(values_schema(COLUMNS))
    batch = collate([r["input_ids"] for r in rows], [r["labels"] for r in rows])
    model = AutoModelForCausalLM.from_pretrained(policy)
    norms = []
    for index in range(2):
        own = Directions.load(place / f"anchors/snapshot-{index:02d}")
        norms.append(TokenValuer(model, own, 2, 4, scores=["gradient_norm"]).value(batch)["gradient_norm"].numpy())
    assert not np.allclose(norms[0], norms[1], rtol=0.05)
    for row, stored in enumerate(found):
        own = stored["gradient_norm"]
        np.testing.assert_allclose(own, np.mean(norms, axis=0)[row, : len(own)], rtol=1e-3, atol=1e-6)
        assert [n != 0 for n in own] == [label != -100 for label in rows[row]["labels"]]


def test_the_mask_keeps_the_highest_values_per_unit_of_gradient_norm_and_says_so(run):
    place, _ = run
    rows, values = table(place, "prepared"), table(place, "values")
    inside = np.concatenate([np.array(row["labels"]) for row in rows]) != -100
    flat = {n: np.concatenate([np.array(v[n]) for v in values])[inside] for n in (*COMPONENTS, "gradient_norm")}
    value = flat["adaptation_direct"] + flat["adaptation_causal"]
    value = (value + 1.5 * (flat["stability_direct"] + flat["stability_causal"])) / flat["gradient_norm"]
    kept = np.concatenate([np.array(row["labels"]) for row in table(place, "masks/default/data")])[inside] != -100
    wanted = value >= np.sort(value)[-rank_of(0.5, len(value))]
    assert (kept == wanted).mean() > 0.995  # float32 against float64 at the threshold
    summary = json.loads((place / "masks/default/summary.json").read_text())
    assert summary["settings"]["divide_by_gradient_norm"] and "gradient_norm" in summary["columns"]
    assert any("gradient_norm" in note for note in summary["notes"])
    assert "norm of the token's own gradient" in (place / "masks/default/README.md").read_text()
    assert "gradient norm" in (place / "report/index.html").read_text()


def test_other_masks_of_the_run_read_the_values_as_ever(alphatoken, run):
    place, same = run
    status, out, err = alphatoken("mask", "-m", *same, "mask.divide_by_gradient_norm=true,false", "mask.normalize=rms")
    assert status == 0, err
    status, _, err = alphatoken("run", *same, "mask.name=plain")
    assert status == 0 and "value: done already" in err
    summary = json.loads((place / "masks/plain/summary.json").read_text())
    assert not summary["settings"]["divide_by_gradient_norm"] and not any("norm" in note for note in summary["notes"])


def test_without_the_column_division_is_refused_in_one_line_before_anything_runs(
    alphatoken, tmp_path, policy, train_file
):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=6"]
    same.append("valuation=paper")
    divided, remedy = "mask.divide_by_gradient_norm=true", "set valuation.scores=[paper,loss,gradient_norm]"
    status, _, err = alphatoken("run", *same, "mask.score=paper", divided)
    assert status == 2 and len(err.strip().splitlines()) == 1 and remedy in err
    assert not (tmp_path / "r/prepared").exists()
    assert alphatoken("run", *same, "mask.score=paper")[0] == 0
    status, _, err = alphatoken("mask", *same, "mask.name=n", "mask.score=paper", divided)
    assert status == 2 and len(err.strip().splitlines()) == 1
    assert f"{divided} needs the column gradient_norm" in err and f"{remedy} and value anew" in err
    assert not (tmp_path / "r/masks/n").exists()


def test_of_pairs_omega_leaves_the_quotient(alphatoken, policy, preference_run):
    status, _, err = alphatoken("mask", f"run.dir={preference_run}", "mask.divide_by_gradient_norm=true", "mask.name=d")
    assert status == 0, err
    summary = json.loads((preference_run / "masks/d/summary.json").read_text())
    assert all(any("gradient_norm" in note for note in one["notes"]) for one in summary["branches"].values())
    rows, found = table(preference_run, "prepared"), table(preference_run, "values")
    model = AutoModelForCausalLM.from_pretrained(policy)
    own = TokenValuer(model, Directions.load(preference_run / "anchors/snapshot-00"), 2, 4)
    for row, stored in zip(rows, found, strict=True):
        for branch, sign in (("chosen", 1), ("rejected", -1)):
            plain = own.value(collate([row[f"{branch}_input_ids"]], [row[f"{branch}_labels"]]))
            norm, direct = np.array(stored[f"{branch}_gradient_norm"]), np.array(stored[f"{branch}_adaptation_direct"])
            np.testing.assert_allclose(norm, stored["omega"] * plain["gradient_norm"][0].numpy(), rtol=1e-3, atol=1e-9)
            inside = norm > 0
            wanted = (plain["adaptation_direct"][0] / plain["gradient_norm"][0]).numpy()[inside]
            np.testing.assert_allclose(direct[inside] / norm[inside], sign * wanted, rtol=1e-2, atol=1e-5)

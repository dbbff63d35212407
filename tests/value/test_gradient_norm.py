"""valuation.gradient_norm and mask.divide_by_gradient_norm through the command line."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from alphatoken import Directions, TokenValuer
from alphatoken.data_schemas import COMPONENTS, preference_values_schema, values_schema
from alphatoken.pipeline.maths.batch import collate
from alphatoken.pipeline.maths.masking import rank_of
from tests.conftest import SMALL

ASKED = ("valuation.gradient_norm=true", "data.validation=6")


def table(run: Path, kind: str) -> list[dict]:
    return [row for file in sorted((run / kind).glob("*-of-*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_cluster, policy, train_file) -> tuple[Path, list[str]]:
    from alphatoken.jobs.cli import main

    place = tmp_path_factory.mktemp("norms")
    same = [f"run.dir={place}", f"model.policy={policy}", f"data.train={train_file}", *SMALL, *ASKED]
    same += ["anchor.snapshots=2", "anchor.drift=warmup", "anchor.warmup.learning_rate=0.01"]
    assert main(["run", *same, "mask.divide_by_gradient_norm=true", "mask.always_keep=[]", "mask.min_kept=0"]) == 0
    return place, same


def test_the_column_is_the_mean_over_snapshots_of_the_librarys(run, policy):
    place, _ = run
    rows, found = table(place, "prepared"), table(place, "values")
    assert pq.read_schema(sorted((place / "values").glob("*.parquet"))[0]).equals(values_schema(gradient_norm=True))
    batch = collate([r["input_ids"] for r in rows], [r["labels"] for r in rows])
    model = AutoModelForCausalLM.from_pretrained(policy)
    norms = []
    for index in range(2):
        own = Directions.load(place / f"anchors/snapshot-{index:02d}")
        norms.append(TokenValuer(model, own, 2, 4, gradient_norm=True).value(batch)["gradient_norm"].numpy())
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
    kept = np.concatenate([np.array(row["labels"]) for row in table(place, "masks/default")])[inside] != -100
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
    assert "gradient_norm" not in json.loads((place / "masks/plain/summary.json").read_text())["columns"]


def test_without_the_column_division_is_refused_in_one_line_before_anything_runs(
    alphatoken, tmp_path, policy, train_file
):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=6"]
    status, _, err = alphatoken("run", *same, "mask.divide_by_gradient_norm=true")
    assert status == 2 and len(err.strip().splitlines()) == 1 and "valuation.gradient_norm=true" in err
    assert not (tmp_path / "r/prepared").exists()
    assert alphatoken("run", *same)[0] == 0
    status, _, err = alphatoken("mask", *same, "mask.name=n", "mask.divide_by_gradient_norm=true")
    assert (
        status == 2
        and "no column gradient_norm" in err.strip().splitlines()[-1]
        and not (tmp_path / "r/masks/n").exists()
    )


@pytest.mark.parametrize("wrong", ["valuation.estimator=exact", "valuation.method=loss"])
def test_what_forms_no_gradient_has_no_norm(alphatoken, tmp_path, policy, train_file, wrong):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, *ASKED, wrong]
    status, _, err = alphatoken("run", *same)
    assert status == 2 and "valuation.gradient_norm=true" in err and "forms no gradient" in err


def test_of_pairs_omega_leaves_the_quotient(alphatoken, tmp_path, policy, reference, pairs_file, preference_run):
    run = tmp_path / "r"
    same = [f"run.dir={run}", f"model.policy={policy}", f"model.reference={reference}", f"data.train={pairs_file}"]
    same += [*SMALL, "valuation.beta=0.3", "data.validation=5", "valuation.gradient_norm=true"]
    status, _, err = alphatoken("run", *same, "mask.divide_by_gradient_norm=true")
    assert status == 0, err
    assert pq.read_schema(sorted((run / "values").glob("*.parquet"))[0]).equals(preference_values_schema(True))
    rows, found = table(run, "prepared"), table(run, "values")
    model = AutoModelForCausalLM.from_pretrained(policy)
    own = TokenValuer(model, Directions.load(run / "anchors/snapshot-00"), 2, 4, gradient_norm=True)
    for row, stored, other in zip(rows, found, table(preference_run, "values"), strict=True):
        for branch, sign in (("chosen", 1), ("rejected", -1)):
            assert stored[f"{branch}_adaptation_direct"] == other[f"{branch}_adaptation_direct"]
            plain = own.value(collate([row[f"{branch}_input_ids"]], [row[f"{branch}_labels"]]))
            norm, direct = np.array(stored[f"{branch}_gradient_norm"]), np.array(stored[f"{branch}_adaptation_direct"])
            np.testing.assert_allclose(norm, stored["omega"] * plain["gradient_norm"][0].numpy(), rtol=1e-3, atol=1e-9)
            inside = norm > 0
            wanted = (plain["adaptation_direct"][0] / plain["gradient_norm"][0]).numpy()[inside]
            np.testing.assert_allclose(direct[inside] / norm[inside], sign * wanted, rtol=1e-2, atol=1e-5)

"""Every score on preference pairs: masks of both branches from one run, and runs that hold few columns or none."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alphatoken.data_schemas import (
    BRANCHES,
    COMPONENTS,
    EXACT,
    REFERENCE_LOSS,
    SCORES,
    preference_values_schema,
    value_columns,
)
from alphatoken.pipeline.maths.uniform import uniform
from tests.conftest import PREFERENCE, SMALL
from tests.maths import pairwise
from tests.maths.tiny_models import LLAMA

COLUMNS = value_columns(list(SCORES), exact=True, reference_loss=True)
WHOLE = ["mask.always_keep=[]", "mask.min_kept=0"]


def rows_of(place: Path) -> list[dict]:
    return [row for file in sorted(place.glob("*-of-*.parquet")) for row in pq.read_table(file).to_pylist()]


def flat(run: Path, rows: list[dict], branch: str, name: str) -> np.ndarray:
    """One column of a branch over all its response tokens; float64."""
    inside = [np.array(row[f"{branch}_labels"]) != -100 for row in rows_of(run / "prepared")]
    return np.concatenate([np.array(r[f"{branch}_{name}"], np.float64)[i] for r, i in zip(rows, inside, strict=True)])


@pytest.fixture(scope="module")
def arguments(policy, reference, pairs_file):
    same = [f"model.policy={policy}", f"model.reference={reference}", f"data.train={pairs_file}", *SMALL, *PREFERENCE]
    return lambda run, *more: [f"run.dir={run}", *same, *more]


@pytest.fixture(scope="module")
def full(tmp_path_factory, ray_cluster, arguments) -> Path:
    """A run over pairs with every column there is."""
    from alphatoken.jobs.cli import main

    run = tmp_path_factory.mktemp("full")
    assert main(["run", *arguments(run, "valuation.exact=true", "valuation.reference_loss=true")]) == 0
    return run


def test_the_other_columns_are_those_of_a_run_without_the_two_that_are_asked_for(full, preference_run):
    found, other = rows_of(full / "values"), rows_of(preference_run / "values")
    assert pq.read_schema(full / "values/part-00000-of-00003.parquet").equals(preference_values_schema(COLUMNS))
    for one, two in zip(found, other, strict=True):
        assert one["id"] == two["id"] and one["omega"] == pytest.approx(two["omega"], rel=1e-5)
    for branch in BRANCHES:
        for name in value_columns(list(SCORES)):
            ours, theirs = flat(full, found, branch, name), flat(full, other, branch, name)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6 * np.abs(theirs).max(), err_msg=name)
    assert rows_of(full / "reference") == rows_of(preference_run / "reference")


def test_the_loss_under_the_reference_is_plain_and_exact_values_are_signed_derivatives_of_each_tokens_loss(
    full, policy, reference
):
    values, prepared = (rows_of(full / name)[:2] for name in ("values", "prepared"))
    theirs = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float64)
    twin = pairwise.oracle(AutoModelForCausalLM.from_pretrained(policy))
    found: dict[str, list[float]] = {name: [] for name in (*EXACT, REFERENCE_LOSS)}
    wanted: dict[str, list[float]] = {name: [] for name in found}
    for row, pair in zip(values, prepared, strict=True):
        for branch, sign in zip(BRANCHES, (1, -1), strict=True):
            ids, labels = pair[f"{branch}_input_ids"], pair[f"{branch}_labels"]
            for name in found:
                found[name] += row[f"{branch}_{name}"]
            for name, direction in zip(EXACT, ("adaptation", "stability"), strict=True):
                stored = load_file(full / f"anchors/snapshot-00/{direction}.safetensors")
                moved = pairwise.moved_logits(twin, LLAMA, 2, ids, {(k, 0): v.double() for k, v in stored.items()})
                own = torch.zeros(len(ids), dtype=torch.float64)
                with torch.no_grad():
                    probability = twin(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
                for t, label in enumerate(labels):
                    if label != -100:
                        own[t] = probability[t - 1] @ moved[t - 1] - moved[t - 1, ids[t]]
                wanted[name] += (sign * row["omega"] * own).tolist()
            with torch.no_grad():
                logps = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
            wanted[REFERENCE_LOSS] += [
                -logps[t - 1, ids[t]].item() if label != -100 else 0.0 for t, label in enumerate(labels)
            ]
    for name, column in wanted.items():
        scale = np.abs(column).max()
        assert scale > 0
        np.testing.assert_allclose(np.array(found[name]) / scale, np.array(column) / scale, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("score", ["paper", "information", "entropy", "loss", "excess_loss", "exact", "random", "full"])
def test_every_score_masks_both_branches_by_its_definition_from_the_one_run(alphatoken, full, score):
    same = [f"run.dir={full}", f"mask.score={score}", f"mask.name={score}", "mask.rho=0.4", "mask.skip_first=0", *WHOLE]
    status, _, err = alphatoken("mask", *same)
    assert status == 0, err
    values, prepared, masks = (
        rows_of(full / "values"),
        rows_of(full / "prepared"),
        rows_of(full / f"masks/{score}/data"),
    )
    summary = json.loads((full / f"masks/{score}/summary.json").read_text())
    assert summary["score"] == score
    drawn = {
        branch: [{f"{branch}_drawn": uniform(0, f"{r['id']} ({branch})", len(r[f"{branch}_labels"]))} for r in prepared]
        for branch in BRANCHES
    }
    for branch in BRANCHES:
        column = {name: flat(full, values, branch, name) for name in COLUMNS}
        stability = column["stability_direct"] + column["stability_causal"]
        value = {
            "paper": column["adaptation_direct"] + column["adaptation_causal"] + 1.5 * stability,
            "information": column["information"],
            "entropy": column["entropy"],
            "loss": -column["loss"],
            "excess_loss": column["loss"] - column["reference_loss"],
            "exact": column["adaptation_exact"] + 1.5 * column["stability_exact"],
            "random": flat(full, drawn[branch], branch, "drawn"),
            "full": np.ones_like(stability),
        }[score]
        wanted = value >= np.sort(value)[-int(np.ceil(0.4 * len(value)))]
        kept = flat(full, masks, branch, "labels") != -100
        assert (kept == wanted).mean() > 0.995
        assert summary["branches"][branch]["kept_tokens"] == kept.sum()


def test_auto_is_the_papers_signed_value(alphatoken, full):
    for score in ("auto", "paper"):
        assert alphatoken("mask", f"run.dir={full}", f"mask.score={score}", f"mask.name=is-{score}")[0] == 0
    found = [rows_of(full / f"masks/is-{score}/data") for score in ("auto", "paper")]
    assert found[0] == found[1]


def test_the_papers_columns_alone_are_enough_for_pairs_and_are_what_they_are_with_all(
    alphatoken, tmp_path, arguments, full
):
    """The default of mask.score depends on what the data turns out to be."""
    status, _, err = alphatoken("run", *arguments(tmp_path / "r", "valuation.scores=[paper]"))
    assert status == 0, err
    values, whole = rows_of(tmp_path / "r/values"), rows_of(full / "values")
    schema = pq.read_schema(tmp_path / "r/values/part-00000-of-00003.parquet")
    assert schema.equals(preference_values_schema(COMPONENTS))
    for branch in BRANCHES:
        for name in COMPONENTS:
            ours, theirs = flat(full, values, branch, name), flat(full, whole, branch, name)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6 * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize(("scores", "score"), [("loss", "loss"), ("", "random")])
def test_without_directions_both_branches_have_their_columns_and_omega_is_that_of_the_models(
    alphatoken, tmp_path, arguments, preference_run, scores, score
):
    run = tmp_path / "r"
    status, _, err = alphatoken("run", *arguments(run, f"valuation.scores=[{scores}]", f"mask.score={score}"))
    assert status == 0, err
    assert not (run / "anchors").exists() and not pq.read_table(run / "prepared/fisher.parquet").num_rows
    columns = value_columns([scores] if scores else [])
    schema = pq.read_schema(sorted((run / "values").glob("part-*"))[0])
    assert schema.equals(preference_values_schema(columns))
    # No prompts of a Fisher were held out, so that the other run has fewer pairs.
    for name in ("values", "reference"):
        ours, theirs = ({row["id"]: row for row in rows_of(place / name)} for place in (run, preference_run))
        assert theirs.keys() < ours.keys()
        for row, other in ((ours[key], other) for key, other in theirs.items()):
            for branch in BRANCHES:
                shared = [f"{branch}_{c}" for c in columns] if name == "values" else [f"{branch}_logps"]
                for each in shared:
                    np.testing.assert_allclose(row[each], other[each], rtol=1e-4, atol=1e-5)
            assert name != "values" or row["omega"] == pytest.approx(other["omega"], rel=1e-4)
    summary = json.loads((run / "masks/default/summary.json").read_text())
    assert summary["score"] == score and 0.5 <= summary["kept_fraction"] < 0.75
    said = "`loss`" if score == "loss" else "`mask.score=random`"
    assert said in (run / "masks/default/README.md").read_text()

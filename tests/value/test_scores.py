"""One run with every column, and the mask that chooses among them; runs with few columns or none do less."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from alphatoken.data_schemas import SCORES, value_columns, values_schema
from alphatoken.pipeline.maths.uniform import uniform
from alphatoken.pipeline.settings.mask import LONG_ANSWER
from tests.conftest import SMALL
from tests.jobs.test_run import hashes

COLUMNS = value_columns(list(SCORES), exact=True, reference_loss=True)
WHOLE = ["mask.always_keep=[]", "mask.min_kept=0"]


def arguments(run: Path, policy: Path, train: Path, *more: str) -> list[str]:
    return [f"run.dir={run}", f"model.policy={policy}", f"data.train={train}", *SMALL, "data.validation=6", *more]


@pytest.fixture(scope="module")
def full(tmp_path_factory, ray_cluster, policy, reference, train_file) -> Path:
    """A run with every column there is."""
    from alphatoken.jobs.cli import main

    run = tmp_path_factory.mktemp("full")
    more = [f"model.reference={reference}", "valuation.exact=true", "valuation.reference_loss=true"]
    assert main(["run", *arguments(run, policy, train_file, *more)]) == 0
    return run


def rows_of(place: Path) -> list[dict]:
    return [row for file in sorted(place.glob("*-of-*.parquet")) for row in pq.read_table(file).to_pylist()]


def flat(run: Path, rows: list[dict], name: str) -> np.ndarray:
    """One column over all response tokens, in order; float64."""
    inside = [np.array(row["labels"]) != -100 for row in rows_of(run / "prepared")]
    return np.concatenate([np.array(row[name], np.float64)[i] for row, i in zip(rows, inside, strict=True)])


def without_weights(policy: Path, place: Path) -> Path:
    """Tokenizer and configuration alone: whoever loads the model fails."""
    place.mkdir()
    for file in policy.iterdir():
        if file.suffix != ".safetensors":
            (place / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(place)
    return place


@torch.no_grad()
def test_loss_entropy_and_reference_loss_are_those_of_plain_forward_passes(full, policy, reference):
    for part in sorted((full / "values").glob("*.parquet")):
        assert pq.read_schema(part).equals(values_schema(COLUMNS))
    models = [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64) for place in (policy, reference)]
    values, prepared = rows_of(full / "values"), rows_of(full / "prepared")
    for row, whole in zip(values, prepared, strict=True):
        assert row["id"] == whole["id"]
        own, theirs = (m(torch.tensor([whole["input_ids"]])).logits[0].log_softmax(-1) for m in models)
        inside = [t for t, label in enumerate(whole["labels"]) if label != -100]
        wanted = {name: np.zeros(len(whole["labels"])) for name in ("loss", "entropy", "reference_loss")}
        for t in inside:
            wanted["loss"][t] = -own[t - 1, whole["input_ids"][t]]
            wanted["entropy"][t] = -(own[t - 1].exp() * own[t - 1]).sum()
            wanted["reference_loss"][t] = -theirs[t - 1, whole["input_ids"][t]]
        for name, column in wanted.items():
            np.testing.assert_allclose(row[name], column, rtol=1e-4, atol=1e-5, err_msg=name)
    assert not np.allclose(flat(full, values, "loss"), flat(full, values, "reference_loss"), rtol=0.1)


def drawn(run: Path, seed: int) -> np.ndarray:
    prepared = rows_of(run / "prepared")
    inside = [np.array(row["labels"]) != -100 for row in prepared]
    return np.concatenate(
        [uniform(seed, row["id"], len(i))[i] for row, i in zip(prepared, inside, strict=True)]
    ).astype(np.float64)


def wanted_values(run: Path, score: str) -> np.ndarray:
    """Of every response token, by the definition of each mask.score; what mask.skip_first leaves out is below all."""
    rows = rows_of(run / "values")
    column = {name: flat(run, rows, name) for name in COLUMNS}
    if score == "paper":
        stability = column["stability_direct"] + column["stability_causal"]
        return column["adaptation_direct"] + column["adaptation_causal"] + 1.5 * stability
    if score == "exact":
        return column["adaptation_exact"] + 1.5 * column["stability_exact"]
    if score == "information":
        labels = [np.array(row["labels"]) != -100 for row in rows_of(run / "prepared")]
        assert max(inside.sum() for inside in labels) < LONG_ANSWER  # of such answers the first token may be kept
        return column["information"]
    return {
        "entropy": column["entropy"], "loss": -column["loss"], "excess_loss": column["loss"] - column["reference_loss"],
        "random": drawn(run, 0), "full": np.ones_like(column["loss"]),
    }[score]  # fmt: skip


@pytest.mark.parametrize("score", ["paper", "information", "entropy", "loss", "excess_loss", "exact", "random", "full"])
def test_every_score_masks_by_its_definition_from_the_one_run(alphatoken, full, score):
    same = [f"run.dir={full}", f"mask.score={score}", f"mask.name={score}", *WHOLE]
    status, out, err = alphatoken("mask", *same, "mask.rho=0.4")
    assert status == 0, err
    kept = flat(full, rows_of(full / f"masks/{score}/data"), "labels") != -100
    value = wanted_values(full, score)
    rank = int(np.ceil(0.4 * len(value)))
    wanted = value >= np.sort(value)[-rank]
    assert (kept == wanted).mean() > 0.995 and kept.sum() > 0  # float32 against float64 at the threshold
    assert kept.all() if score == "full" else kept.mean() == pytest.approx(0.4, abs=0.02)
    summary = json.loads((full / f"masks/{score}/summary.json").read_text())
    assert summary["score"] == score == summary["settings"]["score"] and summary["kept_tokens"] == kept.sum()
    card = (full / f"masks/{score}/README.md").read_text()
    said = {"paper": "AlphaToken values", "exact": "exact derivative", "random": "mask.score=random"}
    assert said.get(score, "mask.score=full" if score == "full" else f"`{score}`") in card
    status, _, err = alphatoken("report", f"run.dir={full}", f"mask.name={score}")
    assert status == 0, err
    assert f"{summary['kept_fraction']:.1%}" in (full / "report/index.html").read_text()


def test_auto_is_information(alphatoken, full):
    for score in ("auto", "information"):
        assert alphatoken("mask", f"run.dir={full}", f"mask.score={score}", f"mask.name=is-{score}")[0] == 0
    found = [rows_of(full / f"masks/is-{score}/data") for score in ("auto", "information")]
    assert found[0] == found[1]


def test_fifteen_masks_from_one_run_load_no_model_and_stand_in_one_table(full):
    scores, rhos = ("paper", "information", "entropy", "loss", "random"), ("0.3", "0.5", "0.7")
    command = "import sys; from alphatoken.jobs.cli import main; status = main(sys.argv[1:]); "
    command += "print({'torch', 'ray', 'transformers'} & set(sys.modules)); sys.exit(status)"
    sweep = ["mask", "-m", f"run.dir={full}", f"mask.score={','.join(scores)}", f"mask.rho={','.join(rhos)}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", command, *sweep], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
    names = {f"score-{score}_rho-{rho}" for score in scores for rho in rhos}
    assert names <= {path.name for path in (full / "masks").iterdir()}
    for name in names:
        summary = json.loads((full / f"masks/{name}/summary.json").read_text())
        (line,) = [line for line in done.stdout.splitlines() if name in line.split()]
        assert f"{summary['kept_fraction']:.1%}" in line
        assert name == f"score-{summary['score']}_rho-{summary['settings']['rho']:g}"


def test_random_does_not_depend_on_shards(alphatoken, tmp_path, full, policy, reference, train_file):
    """Nor on anything but the seed and each example's id."""
    kept = {}
    for seed in (0, 1):
        run = tmp_path / f"seed-{seed}"
        same = arguments(run, policy, train_file, f"model.reference={reference}", "data.shard_examples=7")
        assert alphatoken("prepare", *same)[0] == 0
        status, _, err = alphatoken("mask", f"run.dir={run}", "mask.score=random", f"run.seed={seed}", *WHOLE)
        assert status == 0, err
        rows = zip(rows_of(run / "prepared"), rows_of(run / "masks/default/data"), strict=True)
        kept[seed] = {whole["id"]: row["labels"] for whole, row in rows}
    assert alphatoken("mask", f"run.dir={full}", "mask.score=random", "mask.name=again", *WHOLE)[0] == 0
    rows = zip(rows_of(full / "prepared"), rows_of(full / "masks/again/data"), strict=True)
    assert {whole["id"]: row["labels"] for whole, row in rows} == kept[0] != kept[1]


def test_columns_that_are_not_asked_for_are_absent_and_the_others_stay_the_same(
    alphatoken, tmp_path, full, policy, reference, train_file
):
    """Twice, since one column's products may serve another."""
    rows = rows_of(full / "values")
    for scores in (["paper", "loss"], ["information", "gradient_norm"]):
        run = tmp_path / scores[0]
        more = [f"model.reference={reference}", f"valuation.scores=[{','.join(scores)}]", f"mask.score={scores[0]}"]
        status, _, err = alphatoken("run", *arguments(run, policy, train_file, *more))
        assert status == 0, err
        columns = value_columns(scores)
        assert pq.read_schema(run / "values/part-00000-of-00004.parquet").equals(values_schema(columns))
        found = rows_of(run / "values")
        assert [row["id"] for row in found] == [row["id"] for row in rows]
        for name in columns:
            ours, theirs = flat(run, found, name), flat(full, rows, name)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6 * np.abs(theirs).max(), err_msg=name)
        if "loss" in columns:
            assert (flat(run, found, "loss") == flat(full, rows, "loss")).all()


def test_loss_and_entropy_need_no_anchors_and_hold_out_no_prompts(
    alphatoken, tmp_path, full, policy, reference, train_file
):
    found = []
    for workers in (1, 2):
        run = tmp_path / "run"
        more = ["valuation.scores=[loss,entropy]", "mask.score=entropy", f"cluster.workers={workers}"]
        status, _, err = alphatoken("run", *arguments(run, policy, train_file, *more))
        assert status == 0, err
        assert "anchor: skipped, since valuation.scores=[loss,entropy] looks at no direction" in err
        plan = json.loads(alphatoken("plan", "--json", *arguments(run, policy, train_file, *more))[1])
        states = {stage: plan["resume"][stage]["state"] for stage in ("prepare", "anchor", "value", "mask")}
        assert states == {"prepare": "done", "anchor": "skipped", "value": "done", "mask": "done"}
        found.append(hashes(run))
        run = run.rename(tmp_path / f"run-{workers}")
    assert found[0] == found[1]
    assert not (run / "anchors").exists() and not pq.read_table(run / "prepared/fisher.parquet").num_rows
    counts = json.loads((run / "run.json").read_text())["stages"]["prepare"]["counts"]
    assert counts["train_rows"] == 34 and not counts.get("fisher_rows")
    assert pq.read_schema(run / "values/part-00000-of-00004.parquet").equals(values_schema(("loss", "entropy")))
    # Three more rows, and so other batches, but the same numbers.
    ours, theirs = ({row["id"]: row for row in rows_of(place / "values")} for place in (run, full))
    assert len(ours) == 34 and theirs.keys() < ours.keys()
    for name in ("loss", "entropy"):
        for row, whole in theirs.items():
            np.testing.assert_allclose(ours[row][name], whole[name], rtol=1e-4, atol=1e-5)
    # Other columns in the same place are another stage.
    again = arguments(run, policy, train_file, "valuation.scores=[loss]", "anchor.drift=none")
    status, _, err = alphatoken("value", *again)
    assert (
        status == 2 and "value: columns was ['loss', 'entropy'], now ['loss']" in err and "run.overwrite=value" in err
    )


@pytest.mark.parametrize("score", ["random", "full"])
def test_without_scores_no_model_is_loaded(alphatoken, tmp_path, policy, train_file, score):
    bare, run = without_weights(policy, tmp_path / "bare"), tmp_path / "run"
    same = arguments(run, bare, train_file, "valuation.scores=[]", f"mask.score={score}", *WHOLE)
    status, _, err = alphatoken("run", *same)
    assert status == 0, err
    assert "value: skipped" in err and "anchor: skipped" in err
    assert not any((run / name).exists() for name in ("values", "anchors", "reference"))
    assert not pq.read_table(run / "prepared/fisher.parquet").num_rows
    kept = np.concatenate([np.array(row["labels"]) for row in rows_of(run / "masks/default/data")]) != -100
    inside = np.concatenate([np.array(row["labels"]) for row in rows_of(run / "prepared")]) != -100
    assert not kept[~inside].any() and kept[inside].mean() == pytest.approx(1 if score == "full" else 0.5, abs=0.01)
    plan = json.loads(alphatoken("plan", "--json", *same)[1])
    states = {stage: plan["resume"][stage]["state"] for stage in ("prepare", "anchor", "value", "mask")}
    assert states == {"prepare": "done", "anchor": "skipped", "value": "skipped", "mask": "done"}
    # A score of values finds none.
    status, _, err = alphatoken("mask", f"run.dir={run}", "mask.score=entropy", "mask.name=m")
    assert status == 1 and "alphatoken value" in err


def test_a_reference_loss_of_one_model_is_refused_before_anything_is_prepared(alphatoken, tmp_path, policy, train_file):
    more = ["valuation.reference_loss=true", "mask.score=excess_loss"]
    status, _, err = alphatoken("run", *arguments(tmp_path / "r", policy, train_file, *more))
    assert status == 2 and "set model.reference to a model" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r/prepared").exists()

"""The plan against what it plans: operations against a counter on the real engine, sizes against the files of a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from alphatoken import Directions, TokenValuer
from alphatoken.data_schemas import SCORES
from alphatoken.pipeline.maths.adapters import Adapters
from alphatoken.pipeline.maths.costs import (
    ghost_flops,
    guard_flops,
    meta_model,
    model_costs,
    outer_flops,
    pair_flops,
    sampling_flops,
    shapes_of,
    step_flops,
    sweep_flops,
    value_flops,
)
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.forward import token_losses_of
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.guard import Guard
from alphatoken.pipeline.maths.learners import ScoredWeights
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.sampling import sample_completions
from alphatoken.pipeline.maths.second_order import curvature_pass
from alphatoken.pipeline.prepare.example import example_data
from benchmarks.example_batches import batches_of, load_example
from benchmarks.operations import counted
from tests.conftest import SMALL


@pytest.fixture(scope="module")
def example():
    """The embedded model, one batch of its data, and the sizes read off a model without weights."""
    model, examples = load_example()
    (batch,) = batches_of(examples[:4], budget=8192)
    costs, scored = model_costs(meta_model(model.config, torch.bfloat16), 3)
    assert all(parameter.is_meta for parameter in scored.model.parameters())
    return model, batch, costs


@pytest.mark.parametrize(
    ("scores", "exact", "window"),
    [
        (["paper", "loss"], False, 32), (["paper", "loss"], False, 0), (["information"], False, 32),
        (["loss", "entropy"], False, 32), (["gradient_norm"], False, 32), (list(SCORES), False, 32), ([], True, 32),
        (list(SCORES), True, 32),
    ],
)  # fmt: skip
def test_value_flops(example, scores, exact, window):
    model, batch, costs = example
    weights = scored_layers(model, 3).weights()
    directions = Directions(
        {n: {k: torch.ones_like(w) for k, w in weights.items()} for n in ("adaptation", "stability")}
    )
    shapes = shapes_of([batch.shape], len(batch.predicting()))
    for drift in (True, False) if exact else (True,):
        if not drift:
            directions.named["stability"] = {k: torch.zeros_like(w) for k, w in weights.items()}
        valuer = TokenValuer(model, directions, 3, window, scores=scores, exact=exact)
        planned = value_flops(costs, shapes, window, scores=scores, exact=exact, drift=drift)
        assert planned == pytest.approx(counted(lambda valuer=valuer: valuer.value(batch)), rel=0.02)


def test_anchor_flops(example):
    model, batch, costs = example
    scored = scored_layers(model, 3)
    shapes = shapes_of([batch.shape], len(batch.predicting()))
    planned = ghost_flops(costs, shapes) + outer_flops(costs, shapes.tokens)
    assert planned == pytest.approx(counted(lambda: ghost_pass(scored, batch, OuterSum(scored))), rel=0.02)
    prompts = [row[:40].tolist() for row in batch.input_ids]
    found = counted(lambda: sample_completions(model, prompts, 8, 1.0, []))
    assert sampling_flops(costs, len(prompts), 40, 8) == pytest.approx(found, rel=0.02)


def test_guard_flops(example):
    model, batch, costs = example
    rows = [row[: len(row) - 20 * i].tolist() for i, row in enumerate(batch.input_ids)]
    guard = Guard(scored_layers(model, 3), "sdpa", 32)
    planned = guard_flops(costs, [len(row) for row in rows])
    assert planned == pytest.approx(counted(lambda: guard(rows)), rel=0.02)
    assert counted(lambda: guard(rows)) == 0 == guard_flops(costs, [1])


def test_sweep_flops(example):
    model, batch, costs = example
    scored = scored_layers(model, 3)
    shapes = shapes_of([batch.shape], len(batch.predicting()))
    for rank, learner in ((0, ScoredWeights(scored)), (4, Adapters(scored, 4, seed=0))):
        start = learner.start()
        with learner.holding(start):
            found = counted(lambda learner=learner: learner.backward(batch, "sdpa"))
            assert step_flops(costs, shapes, rank) == pytest.approx(found, rel=0.02)
            for objectives in (1, 2):
                directions = {str(index): start for index in range(objectives)}
                found = counted(lambda ask=(learner, batch, directions, lambda *product: None): curvature_pass(*ask))
                assert sweep_flops(costs, shapes, objectives, rank) == pytest.approx(found, rel=0.02)


def test_an_unrolled_run_is_planned_with_its_tape_and_refused_as_the_run_would_be(
    alphatoken, tmp_path, policy, train_file
):
    common = [f"run.dir={tmp_path}", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "anchor=unrolled"]
    common += ["data.validation=16", "anchor.unroll.batch_size=4", "anchor.unroll.examples=16"]
    plan = json.loads(alphatoken("plan", *common, "--json")[1])
    assert plan["model"]["snapshots"] == 10 and plan["flops"]["anchor"]["unrolled"] > 0
    scored = plan["model"]["coverage"]["scored"]
    assert plan["storage"]["tape"] == 2 * 27 * 4 * scored
    assert plan["storage"]["anchors"] == 31 * plan["storage"]["direction"]
    bounded = json.loads(alphatoken("plan", *common, f"anchor.unroll.tape_bytes={26 * 4 * scored}", "--json")[1])
    assert bounded["storage"]["tape"] < plan["storage"]["tape"]
    assert bounded["flops"]["anchor"]["unrolled"] > plan["flops"]["anchor"]["unrolled"]
    for wrong, remedy in (("data.validation=15", "at least 16"), ("anchor.unroll.tape_bytes=9", "needs at least")):
        status, _, err = alphatoken("plan", *common, wrong)
        assert status == 2 and remedy in err


def test_of_tasks_that_are_halved_for_a_trial_the_rows_that_make_directions_are_planned(
    alphatoken, tmp_path, policy, train_file
):
    lines = train_file.read_text().splitlines(keepends=True)
    files = {"code": tmp_path / "a.jsonl", "maths": tmp_path / "b.jsonl"}
    for number, file in enumerate(files.values()):
        file.write_text("".join(lines[20 * number : 20 * number + 20]))
    tasks = "data.validation={" + ", ".join(f"{name}: {file}" for name, file in files.items()) + "}"
    common = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, tasks]
    common.append("data.validation_trial=half")
    status, out, err = alphatoken("plan", *common, "--json")
    assert status == 0, err
    planned = json.loads(out)["data"]
    assert alphatoken("prepare", *common)[0] == 0
    sources = pq.read_table(tmp_path / "r/prepared/validation.parquet")["source"].to_pylist()
    found = {name: sum(source.startswith(str(file)) for source in sources) for name, file in files.items()}
    assert planned["tasks"] == {f"adaptation_{name}": count for name, count in found.items()}
    assert planned["validation_examples"] == len(sources) == 20 and len(set(found.values())) == 2


def test_pairs_add_a_pass_of_the_reference_and_after_a_warm_up_one_of_the_policys_upper_layers(example):
    model, batch, costs = example
    shapes = shapes_of([batch.shape], len(batch.predicting()))
    reference = counted(lambda: token_losses_of(model, batch, "sdpa"))
    assert pair_flops(costs, shapes, "checkpoint", True) == pytest.approx(reference, rel=0.02)
    with lower_layers_once(scored_layers(model, 3)):
        token_losses_of(model, batch, "sdpa")
        upper = counted(lambda: token_losses_of(model, batch, "sdpa"))
    assert pair_flops(costs, shapes, "warmup", True) == pytest.approx(reference + upper, rel=0.02)
    assert pair_flops(costs, shapes, "checkpoint", False) == 0


def test_fewer_scores_cost_the_passes_of_the_models_that_they_run(alphatoken, policy, reference, train_file):
    plans = {}
    for score, scores, more, models in (
        ("random", "", [], 0), ("full", "", [], 0), ("loss", "loss", [], 1), ("entropy", "loss,entropy", [], 1),
        ("excess_loss", "loss", ["valuation.reference_loss=true"], 2),
    ):  # fmt: skip
        command = [f"model.policy={policy}", f"model.reference={reference}", f"data.train={train_file}", *SMALL, *more]
        command += [f"valuation.scores=[{scores}]", f"mask.score={score}"]
        status, out, err = alphatoken("plan", *command, "--json")
        assert status == 0, err
        plans[score] = plan = json.loads(out)
        value = plan["flops"]["value"]
        assert plan["flops"]["anchor"]["flops"] == plan["storage"]["anchors"] == plan["data"]["fisher_prompts"] == 0
        assert plan["flops"]["total"] == value["flops"] == pytest.approx(models * value["forward"], rel=0.3)
        assert len(plan["model"]["columns"]) == len([one for one in scores.split(",") if one]) + len(more)
    assert plans["excess_loss"]["flops"]["total"] == 2 * plans["loss"]["flops"]["total"] > 0
    everything, half = plans["full"]["storage"], plans["random"]["storage"]
    assert everything["masks, each"] > half["masks, each"]
    sizes = [plans[score]["storage"]["values"] for score in ("random", "loss", "entropy")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3


def test_sizes_of_a_run_over_pairs(alphatoken, preference_run):
    status, out, err = alphatoken("plan", "--from", preference_run / "run.json", "--json")
    assert status == 0, err
    plan = json.loads(out)
    stages = json.loads((preference_run / "run.json").read_text())["stages"]
    assert plan["data"]["format"] == "preference"
    assert plan["data"]["train_examples"] == stages["prepare"]["counts"]["train_rows"]
    assert plan["data"]["tokens"] == stages["value"]["counts"]["tokens"]
    for name, directory in (
        ("prepared",) * 2,
        ("values",) * 2,
        ("reference",) * 2,
        ("masks, each", "masks/default/data"),
    ):
        written = sum(p.stat().st_size for p in preference_run.glob(f"{directory}/*.parquet"))
        assert plan["storage"][name] == pytest.approx(written, rel=0.05), name


def test_sizes_are_those_of_a_real_run_of_the_embedded_example(alphatoken, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text("".join(Path(example_data()).read_text().splitlines(keepends=True)[:24]))
    common = [f"run.dir={tmp_path}/r", f"data.train={train}", "data.validation=4", "anchor.fisher.prompts=2"]
    common += ["anchor.fisher.max_new_tokens=4", "anchor.warmup.steps=1", "anchor.warmup.batch_size=1"]
    status, out, err = alphatoken("plan", *common, "--json")
    assert status == 0, err
    plan = json.loads(out)
    assert not (tmp_path / "r").exists()
    assert alphatoken("run", *common)[0] == 0

    def size(*patterns: str) -> int:
        return sum(p.stat().st_size for pattern in patterns for p in (tmp_path / "r").glob(pattern))

    storage = plan["storage"]
    assert storage["prepared"] == pytest.approx(size("prepared/*"), rel=0.05)
    assert storage["anchors"] == pytest.approx(size("anchors/*.safetensors", "anchors/*/*"), rel=0.05)
    assert storage["direction"] == pytest.approx(size("anchors/snapshot-00/adaptation.safetensors"), rel=0.05)
    assert storage["values"] == pytest.approx(size("values/*"), rel=0.05)
    assert storage["masks, each"] == pytest.approx(size("masks/default/data/*.parquet"), rel=0.05)
    counts = json.loads((tmp_path / "r/run.json").read_text())["stages"]
    assert plan["data"]["train_examples"] == counts["value"]["counts"]["rows"] == 18
    assert plan["data"]["tokens"] == counts["value"]["counts"]["tokens"]
    assert plan["data"]["padded_tokens"] == counts["value"]["counts"]["padded_tokens"]
    assert plan["model"]["coverage"] == counts["anchor"]["counts"]["coverage"]


@pytest.mark.parametrize(
    "direction",
    [
        ["anchor.warmup.steps=3", "anchor.warmup.examples=5"],
        ["anchor=unrolled", "anchor.unroll.orders=2", "anchor.unroll.steps=4", "anchor.unroll.examples=8",
         "anchor.unroll.batch_size=2", "anchor.unroll.snapshots=2"],
    ],
)  # fmt: skip
def test_operations_are_those_of_the_stages_rows_drawn_as_they_draw_them(
    alphatoken, tmp_path, policy, train_file, direction
):
    common = [
        f"run.dir={tmp_path}/r",
        f"model.policy={policy}",
        f"data.train={train_file}",
        *SMALL,
        "data.validation=16",
    ]
    common += ["data.shard_examples=4", "anchor.fisher.prompts=2", "anchor.fisher.max_new_tokens=2"]
    common += ["cluster.address=inline"]
    status, out, err = alphatoken("plan", *common, *direction, "--json")
    assert status == 0, err
    plan = json.loads(out)["flops"]
    assert alphatoken("prepare", *common, *direction)[0] == 0
    for stage in ("anchor", "value"):
        found = counted(lambda stage=stage: alphatoken(stage, *common, *direction))
        assert plan[stage]["flops"] == pytest.approx(found, rel=0.05), stage


def test_the_plan_needs_no_weights_and_says_what_resume_would_skip(alphatoken, tmp_path, policy, train_file):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(policy).iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    common = [f"data.train={train_file}", *SMALL, "data.validation=5"]
    status, out, err = alphatoken("plan", f"run.dir={tmp_path}/none", f"model.policy={bare}", *common)
    assert status == 0 and "to do" in out and "coverage 100.0%" in out, err

    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", *common]
    assert alphatoken("prepare", *same)[0] == 0
    plan = json.loads(alphatoken("plan", *same, "--json")[1])
    assert [plan["resume"][stage]["state"] for stage in ("prepare", "anchor")] == ["done", "new"]
    plan = json.loads(alphatoken("plan", *same, "data.max_length=200", "--json")[1])
    assert plan["resume"]["prepare"]["state"] == "refused"
    assert plan["resume"]["prepare"]["changed"] == ["data.max_length"]

    assert alphatoken("run", *same)[0] == 0
    plans = [json.loads(alphatoken("plan", *same, *more, "--json")[1]) for more in ([], ["data.max_length=200"])]
    assert [plan["resume"]["mask"]["state"] for plan in plans] == [
        "done",
        "new",
    ]  # of other rows it would be another mask
    mask = json.loads(alphatoken("plan", *same, "mask.rho=0.3", "--json")[1])["resume"]["mask"]
    assert mask["state"] == "refused" and mask["changed"] == ["mask.rho"] and "another mask.name" in mask["remedy"]
    assert alphatoken("run", *same, "mask.rho=0.3")[0] == 2


def test_the_plan_shows_no_bar_of_a_library(tmp_path, policy, train_file):
    """In a process of its own that has read no such file before."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HOME": str(tmp_path / "cache")}
    given = [f"run.dir={tmp_path}/run", f"model.policy={policy}", f"data.train={train_file}", "data.validation=6"]
    command = [sys.executable, "-c", "import sys; from alphatoken.jobs.cli import main; sys.exit(main(sys.argv[1:]))"]
    done = subprocess.run([*command, "plan", *given], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "training examples" in done.stdout, done.stderr
    assert "examples/s" not in done.stderr and "%|" not in done.stderr, done.stderr

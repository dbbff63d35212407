"""`mask` takes values as they are: what it is told of earlier stages has to be what they were made with."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import SMALL

LAYERS_AND_WINDOW = ("valuation.layers=2", "valuation.window=4")


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_cluster, policy, train_file) -> tuple[Path, list[str]]:
    """A run with the paper's columns and the loss, and the command that made it."""
    from alphatoken.jobs.cli import main

    run = tmp_path_factory.mktemp("given") / "run"
    same = [f"run.dir={run}", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=6"]
    same = [*same, "valuation=paper", *LAYERS_AND_WINDOW]
    assert main(["run", *same, "mask.score=paper"]) == 0
    return run, same


def test_the_whole_command_of_the_run_is_accepted(alphatoken, made):
    run, same = made
    status, _, err = alphatoken("mask", *same, "mask=paper", "mask.name=same")
    assert status == 0, err
    assert (run / "masks/same/summary.json").exists()


@pytest.mark.parametrize(
    "equal",
    [
        ["valuation.window=4"], ["valuation.scores=[paper,loss]"], ["valuation=paper", *LAYERS_AND_WINDOW],
        ["anchor=auto"], ["anchor.drift=auto"], ["++data.validation=6"], ["cluster.workers=2", "debug=true"],
    ],
)  # fmt: skip
def test_equal_keys_and_groups_are_accepted(alphatoken, made, equal):
    run, _ = made
    status, _, err = alphatoken("mask", f"run.dir={run}", *equal, "mask.score=paper")
    assert status == 0 and "mask: default is done already" in err, err


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["valuation.window=9"], "valuation.window=9: mask takes the values that are there, which were made with valuation.window=4"),
        (["valuation.scores=[paper,loss,entropy]"], "which were made with valuation.scores=[paper,loss]"),
        (["valuation.exact=true"], "valuation.exact=true: mask takes the values that are there"),
        (["++valuation.layers=3"], "valuation.layers=3: mask takes the values"),
        (["anchor.drift=none", "mask.stability_weight=0"], "which were made with anchor.drift=auto"),
        (["anchor.warmup.steps=9"], "anchor.warmup.steps=9: mask takes the values"),
        (["data.max_length=7"], "which were made with"),
        (["data.train=/elsewhere.jsonl"], "data.train=/elsewhere.jsonl: mask takes the values"),
        (["model.policy=/elsewhere"], "model.policy=/elsewhere: mask takes the values"),
        (["model.dtype=bfloat16"], "which were made with model.dtype=auto"),
        (["valuation=paper", "valuation.window=4"], "valuation.layers=3: mask takes the values"),
        (["anchor=none", "mask.stability_weight=0"], "anchor.drift=none: mask takes the values"),
        (["anchor=warmup"], "anchor.drift=warmup: mask takes the values"),
    ],
)  # fmt: skip
def test_other_keys_and_groups_are_refused_in_a_line_that_says_what_was(alphatoken, made, other, said):
    run, _ = made
    status, out, err = alphatoken("mask", f"run.dir={run}", *other, "mask.score=paper", "mask.name=other")
    assert status == 2 and out == "" and said in err, err
    last = err.strip().splitlines()[-1]
    assert len(err.strip().splitlines()) == 1 and "alphatoken run" in last and "run.overwrite" in last
    assert not (run / "masks/other").exists()


def test_of_an_experiment_the_keys_of_earlier_stages_are_looked_at(alphatoken, made):
    run, same = made
    given = [one for one in same if one.startswith(("model.policy", "data.train"))]
    status, _, err = alphatoken("mask", f"run.dir={run}", "experiment=paper_sft", *given, "mask.name=experiment")
    lines = err.strip().splitlines()
    assert status == 2 and not any("mask." in line.split(":")[1] for line in lines), err
    for other in ("data.validation=32", "model.dtype=bfloat16", "anchor.fisher.prompts=1000", "valuation.window=32"):
        assert any(f"{other}: mask takes the values" in line for line in lines), other
    assert not any("anchor.drift" in line or "valuation.scores" in line for line in lines)  # these are as they were


def test_of_an_experiment_the_groups_that_it_chooses_are_looked_at_too(alphatoken, made):
    run, _ = made
    status, _, err = alphatoken("mask", f"run.dir={run}", "experiment=embedded", "mask.name=experiment")
    assert status == 2 and "model.policy=embedded: mask takes the values" in err
    assert "data.train=embedded: mask takes the values" in err and not (run / "masks/experiment").exists()


@pytest.mark.parametrize(
    ("command", "other", "said"),
    [
        ("anchor", "data.max_length=7", "data.max_length=7: anchor takes the rows that are there, which were made with"),
        ("value", "data.max_length=7", "data.max_length=7: value takes the rows and anchors that are there"),
        ("value", "anchor.warmup.steps=9", "which were made with anchor.warmup.steps=2"),
        ("value", "anchor.unroll.layers=2", "which were made with anchor.unroll.layers=null"),
        ("report", "valuation.window=9", "valuation.window=9: report takes the values and masks that are there"),
        ("report", "mask.rho=0.3", "mask.rho=0.3: report shows the masks that are there, and masks/default was made with mask.rho=0.5"),
        ("report", "mask.name=none", "mask.name=none: there is no such mask in"),
    ],
)  # fmt: skip
def test_other_commands_refuse_keys_of_what_they_take_as_it_is(alphatoken, made, command, other, said):
    run, same = made
    before = (run / "run.json").read_text()
    status, out, err = alphatoken(command, *same, other)
    assert status == 2 and out == "" and said in err.strip().splitlines()[-1], err
    assert (run / "run.json").read_text() == before


def test_a_place_is_the_same_however_it_is_said(alphatoken, made, monkeypatch):
    run, same = made
    (train,) = [Path(one.partition("=")[2]) for one in same if one.startswith("data.train")]
    monkeypatch.chdir(train.parent)
    others = [one for one in same if not one.startswith("data.train")]
    for command in ("anchor", "value", "report"):
        status, _, err = alphatoken(command, *others, f"data.train={train.name}", "mask.score=paper")
        assert status == 0, err


def test_each_mask_is_replayed_from_its_own_summary(alphatoken, made, tmp_path):
    """A run.json knows the last one alone, and says so."""
    run, same = made
    sweep = ["mask.score=paper,loss", "mask.rho=0.2,0.6", "mask.skip_first=1"]
    assert alphatoken("mask", "-m", f"run.dir={run}", *sweep)[0] == 0
    name = "score-paper_rho-0.2"
    status, _, err = alphatoken("run", f"--from={run}/masks/{name}/summary.json", f"run.dir={tmp_path}/again")
    assert status == 0, err
    (again,) = (tmp_path / "again/masks").iterdir()
    for file in again.rglob("*.parquet"):
        assert file.read_bytes() == (run / f"masks/{name}" / file.relative_to(again)).read_bytes()
    assert again.name == name
    assert (again / "summary.json").read_text() == (run / f"masks/{name}/summary.json").read_text()
    status, _, err = alphatoken("plan", "--from", f"{run}/run.json", f"run.dir={tmp_path}/other")
    assert status == 0 and "the settings of its last mask, score-loss_rho-0.6; of the others (" in err, err
    assert f"--from {run}/masks/NAME/summary.json" in err
    status, _, err = alphatoken("plan", "--from", f"{tmp_path}/masks/x/summary.json")
    assert status == 2 and "there is no such file" in err


def test_every_other_key_is_said_at_once_and_nothing_of_the_run_changes(alphatoken, made):
    run, _ = made
    before = (run / "run.json").read_text()
    status, _, err = alphatoken("mask", f"run.dir={run}", "valuation.window=9", "data.max_length=7", "mask.name=other")
    assert status == 2 and len(err.strip().splitlines()) == 2
    assert (run / "run.json").read_text() == before


def test_in_a_sweep_the_points_that_say_otherwise_fail_by_name(alphatoken, made):
    run, _ = made
    sweep = ["mask.score=paper", "mask.rho=0.2,0.6", "valuation.window=9"]
    status, _, err = alphatoken("mask", "-m", f"run.dir={run}", *sweep)
    assert status == 1 and "2 of 2 points failed: rho-0.2, rho-0.6" in err.strip().splitlines()[-1]
    assert "valuation.window=9: mask takes the values" in err and not (run / "masks/rho-0.2").exists()


@pytest.mark.parametrize(
    ("overrides", "reason", "remedy"),
    [
        (["mask.score=information"], "mask.score=information needs the column information", "valuation.scores=[paper,information,loss]"),
        (["mask.score=entropy"], "mask.score=entropy needs the column entropy", "valuation.scores=[paper,loss,entropy]"),
        (["mask.score=exact"], "mask.score=exact needs the column adaptation_exact", "valuation.exact=true"),
        (["mask.score=excess_loss"], "mask.score=excess_loss needs the column reference_loss", "valuation.reference_loss=true"),
        (["mask.score=loss", "mask.divide_by_gradient_norm=true"], "mask.divide_by_gradient_norm=true needs the column gradient_norm",
         "valuation.scores=[paper,loss,gradient_norm]"),
    ],
)  # fmt: skip
def test_a_column_that_is_absent_is_refused_with_the_key_to_set(alphatoken, made, overrides, reason, remedy):
    run, _ = made
    status, out, err = alphatoken("mask", f"run.dir={run}", *overrides, "mask.name=absent")
    assert status == 2 and out == "" and len(err.strip().splitlines()) == 1, err
    assert reason in err and f"set {remedy} and value anew, `alphatoken run --from" in err
    assert f" {shlex.quote(remedy)} run.overwrite=value`" in err  # a shell reads brackets
    assert "values/ has what mask.score=paper, loss, random, full need" in err
    assert not (run / "masks/absent").exists()


def test_what_the_message_says_to_set_makes_the_column(alphatoken, made, tmp_path):
    """With run.overwrite=value; the anchors are kept."""
    run, same = made
    copy = shutil.copytree(run, tmp_path / "run")
    more = ["valuation.scores=[paper,loss,entropy]", "run.overwrite=value", "mask.score=entropy"]
    status, _, err = alphatoken("run", f"run.dir={copy}", *same[1:], *more)
    assert status == 0 and "anchor: done already" in err, err
    assert json.loads((copy / "masks/default/summary.json").read_text())["score"] == "entropy"

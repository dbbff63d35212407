"""`alphatoken trial` on a tiny real model: files, numbers that do not depend on workers, going on, and what is refused."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from alphatoken.pipeline.trial import budget
from tests.conftest import SMALL, write_rows
from tests.jobs.trial_files import results, summary

QUICK = ["trial.seeds=2", "trial.steps=3", "trial.batch_size=2", "trial.examples=12", "trial.learning_rate=0.01"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_cluster, policy, train_file) -> Path:
    """A run with rows kept for a trial."""
    from alphatoken.jobs.cli import main

    run = tmp_path_factory.mktemp("trial") / "run"
    arguments = [f"run.dir={run}", f"model.policy={policy}", f"data.train={train_file}", *SMALL]
    assert main(["run", *arguments, "data.validation=10", "data.validation_trial=half"]) == 0
    return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of it in which no trial was made."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def fine_tunes(run: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(run)): p.read_bytes() for p in sorted((run / "trial").rglob("*.json")) if "seed-" in p.name
    }


def of_default(run: Path, seed: int) -> Path:
    """The file of one fine-tune on the mask `default`."""
    files = (run / "trial/fine-tunes").glob(f"mask-*/seed-{seed:02d}.json")
    return next(file for file in files if json.loads(file.read_text())["candidate"] == "default")


def test_a_trial_needs_no_settings_but_the_run_and_leaves_a_table_and_a_sentence(alphatoken, run):
    status, out, err = alphatoken("trial", f"run.dir={run}", *QUICK, "trial.masks=default", "trial.rho=0.3,0.7")
    assert status == 0, err
    found = results(run)
    kept = [
        json.loads((run / f"masks/default_rho-{rho}/summary.json").read_text())["kept_fraction"] for rho in (0.3, 0.7)
    ]
    names = ["full", "full but first tokens", "default_rho-0.3", "default_rho-0.7"]
    names += [f"random {round(100 * fraction)} %" for fraction in kept]
    for name in names:
        assert [row["seed"] for row in found if row["candidate"] == name] == [0, 1] and name in out
    assert len(found) == 1 + 2 * len(names) and not any(row["failed"] for row in found)
    whole = summary(run)
    assert whole["sentence"] in out and whole["sentence"].count(".\n") == 0 and len(whole["lines"]) == 7
    assert [line["adaptation"][0] for line in whole["lines"]] == sorted(
        line["adaptation"][0] for line in whole["lines"]
    )
    assert "fine-tunes (7 candidates, 2 seed(s)) of 3 steps on 12 examples" in err and "operations, about" in err
    untouched = next(row for row in found if row["candidate"] == "untouched")
    assert untouched["retention"] < 1e-4 < min(row["retention"] for row in found if row["candidate"] != "untouched")
    losses = {row["candidate"]: row["adaptation"] for row in found if row["seed"] == 0}
    assert len(set(losses.values())) == len(losses)  # each is trained on something else
    assert "measured on rows" not in out and not whole["held_out_made_directions"]
    for row in found:
        assert sum(row["row_losses"]) / sum(row["row_tokens"]) == pytest.approx(row["adaptation"])
    assert json.loads((run / "run.json").read_text())["stages"]["trial"]["state"] == "done"


def test_same_numbers_with_one_worker_and_with_two_and_with_less_room_for_hidden_states(alphatoken, run, tmp_path):
    found = []
    for more in (["cluster.workers=1"], ["cluster.workers=2"], ["cluster.workers=1", "trial.cache_bytes=3000"]):
        assert alphatoken("trial", f"run.dir={run}", *QUICK, *more)[0] == 0
        found.append((results(run), (run / "trial/results.parquet").read_bytes(), fine_tunes(run)))
        shutil.rmtree(run / "trial")
    assert found[0] == found[1] and found[0][0] == found[2][0]


def test_a_trial_goes_on_and_a_mask_that_comes_later_costs_its_own_fine_tunes_alone(alphatoken, run):
    assert alphatoken("trial", f"run.dir={run}", *QUICK)[0] == 0
    before = fine_tunes(run)
    of_default(run, 1).unlink()
    (run / "trial/fine-tunes/full-100/seed-00.json").write_text("{")
    status, _, err = alphatoken("trial", f"run.dir={run}", *QUICK)
    assert (
        status == 0
        and "7 of 9 fine-tunes are done already" in err
        and "for the 2 that are left" in err
        and fine_tunes(run) == before
    )
    status, _, err = alphatoken("trial", f"run.dir={run}", *QUICK, "trial.masks=[default,paper]")
    assert status == 0 and "9 of 13 fine-tunes are done already" in err, err
    assert (run / "masks/paper/summary.json").exists()
    status, out, err = alphatoken("trial", f"run.dir={run}", *QUICK, "trial.learning_rate=0.02")
    assert status == 0 and "done already" not in err  # other settings take the place of those before


def test_a_mask_that_comes_later_is_tried_on_as_many_examples_as_those_before(alphatoken, run, monkeypatch):
    own = [one for one in QUICK if "examples" not in one and "steps" not in one]
    assert alphatoken("trial", f"run.dir={run}", *own, "trial.seeds=1")[0] == 0
    before = summary(run)
    assert before["steps"] == 20 and before["examples"] > 4
    monkeypatch.setattr(budget, "FEWEST_STEPS", 2)
    monkeypatch.setattr(budget, "SECONDS", 0)  # nothing fits any more
    status, _, err = alphatoken("trial", f"run.dir={run}", *own, "trial.seeds=1", "trial.masks=[default,paper]")
    assert status == 0 and "5 of 7 fine-tunes are done already" in err, err
    assert [summary(run)[key] for key in ("steps", "examples")] == [before[key] for key in ("steps", "examples")]


def test_masks_that_leave_the_same_tokens_are_fine_tuned_on_once(alphatoken, run):
    assert alphatoken("mask", f"run.dir={run}", "mask.name=again")[0] == 0
    status, out, err = alphatoken("trial", f"run.dir={run}", *QUICK, "trial.masks=[default,again]")
    assert status == 0 and "9 fine-tunes" in err and "mask again leaves what default leaves" in err, err
    estimate = err.split(" operations")[0].split()[-1]
    found = {(row["candidate"], row["seed"]): row for row in results(run)}
    for seed in (0, 1):
        assert found["again", seed] == {**found["default", seed], "candidate": "again"}
    assert "again" in out
    status, _, err = alphatoken("trial", f"run.dir={run}", *QUICK, "trial.masks=[again,default]")
    assert status == 0 and "9 of 9 fine-tunes are done already" in err, err  # the order of names costs nothing
    status, _, err = alphatoken("trial", f"run.dir={run}", *QUICK, "trial.masks=[default]")
    assert status == 0 and f" {estimate} operations" in err, err  # nor does the estimate count twins


def test_a_sweep_over_masks_is_made_on_the_way(alphatoken, run):
    status, out, err = alphatoken(
        "trial", f"run.dir={run}", *QUICK, "trial.seeds=1", "mask.score=entropy,loss", "mask.rho=0.4"
    )
    assert status == 0, err
    assert {"score-entropy", "score-loss"} <= {line["name"] for line in summary(run)["lines"]}
    kept = json.loads((run / "masks/score-loss/summary.json").read_text())
    assert kept["settings"]["rho"] == 0.4 and "One seed cannot judge" in out


def test_rho_is_varied_of_every_mask_that_can_be_tried(alphatoken, run):
    for more in (["mask.score=loss", "mask.rho=0.3", "mask.name=loss_rho-0.3"], ["mask.rule=weight", "mask.name=soft"]):
        assert alphatoken("mask", f"run.dir={run}", *more)[0] == 0
    arguments = ["trial", f"run.dir={run}", *QUICK, "trial.seeds=1"]
    for rhos in ("0.5", "0.5,0.7"):  # what the first has made is not varied by the second
        status, _, err = alphatoken(*arguments, f"trial.rho={rhos}")
        assert status == 0 and "mask soft is left out: its soft weights" in err, err
    made = {line["name"] for line in summary(run)["lines"]}
    wanted = {f"{name}_rho-{rho}" for name in ("default", "loss_rho-0.3") for rho in (0.5, 0.7)}
    assert wanted <= made and not any(name.count("_rho-") > 2 or name.startswith("soft") for name in made)


def test_what_auto_cannot_try_is_said_before_any_stage(alphatoken, tmp_path, policy, train_file):
    arguments = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, *QUICK]
    status, _, err = alphatoken("run", *arguments, "data.validation=10", "trial.auto=true", "mask.rule=weight")
    assert status == 2 and "trial.auto=true tries mask default, whose mask.rule=weight" in err
    assert not (tmp_path / "r/prepared").exists()


def test_auto_leaves_presets_out_that_the_values_do_not_allow_at_every_rho(alphatoken, tmp_path, policy, train_file):
    arguments = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, *QUICK]
    arguments += [
        "data.validation=10",
        "trial.auto=true",
        "trial.seeds=1",
        "trial.rho=0.5",
        "valuation.scores=[entropy,loss]",
    ]
    status, _, err = alphatoken("run", *arguments, "mask.score=entropy")
    assert status == 0 and "trial: mask paper_rho-0.5 is left out" in err, err
    assert "default_rho-0.5" in {line["name"] for line in summary(tmp_path / "r")["lines"]}


def test_rows_that_made_the_directions_are_said_beforehand_in_the_table_and_in_the_sentence(
    alphatoken, tmp_path, policy, train_file
):
    place = tmp_path / "r"
    arguments = [f"run.dir={place}", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=5"]
    assert alphatoken("run", *arguments)[0] == 0
    status, out, err = alphatoken("trial", f"run.dir={place}", *QUICK)
    assert status == 0 and "data.validation_trial=half" in err
    assert "WARNING" in out and "measured on rows that also made the directions" in summary(place)["sentence"]


def test_auto_ends_with_the_winner_as_chosen(alphatoken, tmp_path, policy, train_file):
    place = tmp_path / "r"
    arguments = [f"run.dir={place}", f"model.policy={policy}", f"data.train={train_file}", *SMALL, *QUICK]
    status, out, err = alphatoken("run", *arguments, "data.validation=10", "trial.auto=true")
    assert status == 0, err
    whole, chosen = summary(place), json.loads((place / "masks/chosen/summary.json").read_text())
    assert {"default", "noise", "paper"} <= {line["name"] for line in whole["lines"]} and str(
        place / "masks/chosen"
    ) in out
    card = " ".join((place / "masks/chosen/README.md").read_text().split())
    assert whole["sentence"] in card and "Token mask `chosen`" in card
    source = place / f"masks/{whole['winner']}/data"
    if source.exists():
        for part in source.glob("*.parquet"):
            labels = [pq.read_table(p)["labels"] for p in (part, place / "masks/chosen/data" / part.name)]
            assert labels[0].equals(labels[1])
        assert whole["sentence"] in " ".join((source / "README.md").read_text().split())
    else:
        assert chosen["settings"]["score"] == "full"
    recorded = json.loads((place / "run.json").read_text())[
        "configuration"
    ]  # what was asked for, to be asked for again
    assert recorded["mask"]["name"] == "default" and recorded["trial"]["masks"] == [] and recorded["trial"]["auto"]
    html = (place / "report/index.html").read_text()
    assert ">Trial</h2>" in html and html.count("<circle") == len(whole["lines"]) - 1
    status, _, err = alphatoken("run", *arguments, "data.validation=10", "trial.auto=true")
    assert status == 0 and "fine-tunes are done already" in err, err


def test_a_fine_tune_that_ends_in_nan_is_named_and_the_others_stand(alphatoken, run):
    assert alphatoken("trial", f"run.dir={run}", *QUICK)[0] == 0
    place = of_default(run, 1)
    content = json.loads(place.read_text())
    failed = {
        key: content[key] for key in ("fingerprint", "candidate", "kind", "seed", "kept_tokens", "trained_tokens")
    }
    place.write_text(json.dumps({**failed, "failed": "NaN or infinity in the loss at step 2"}))
    status, out, err = alphatoken("trial", f"run.dir={run}", *QUICK)
    assert status == 0 and "left out: default, seed 1: NaN or infinity in the loss at step 2" in out, err
    assert next(line for line in summary(run)["lines"] if line["name"] == "default")["seeds"] == 1
    status, _, err = alphatoken("trial", f"run.dir={run}", *QUICK, "trial.learning_rate=1e30")
    assert (
        status == 1 and "full has no numbers" in err.splitlines()[-1] and "trial.learning_rate" in err.splitlines()[-1]
    )


def test_a_mask_that_wins_in_the_last_layers_is_to_be_asked_about_in_all(alphatoken, run):
    assert alphatoken("trial", f"run.dir={run}", *QUICK)[0] == 0
    for seed in (0, 1):  # as if the mask had halved every loss
        place = of_default(run, seed)
        content = json.loads(place.read_text())
        halves = {"adaptation": content["adaptation"] / 2, "row_losses": [loss / 2 for loss in content["row_losses"]]}
        place.write_text(json.dumps({**content, **halves}))
    status, out, err = alphatoken("trial", f"run.dir={run}", *QUICK)
    assert status == 0 and "fine-tunes are done already" in err, err
    said = "the last 2 layers alone learned: ask with trial.train=lora before you train all of them."
    assert summary(run)["winner"] == "default" and said in out


def test_what_cannot_be_tried_is_refused_in_a_line(alphatoken, run, tmp_path, made):
    def refused(status: int, reason: str, *more: str) -> None:
        found, _, err = alphatoken("trial", f"run.dir={run}", *more)
        assert found == status and reason in err.splitlines()[-1], err

    refused(2, "trial.seeds=0: must be at least 1", "trial.seeds=0")
    refused(2, "trial.train=some: must be one of layers, lora, all", "trial.train=some")
    refused(2, "trial.rank=0: must be at least 1", "trial.rank=0")
    refused(2, "data.max_length=7: trial takes the values that are there", "data.max_length=7")
    refused(2, "trial.masks=moon: neither a mask in", "trial.masks=moon")
    assert alphatoken("mask", f"run.dir={run}", "mask.rule=weight", "mask.name=soft")[0] == 0
    refused(2, "soft weights", "trial.masks=soft")
    # A mask of other rows: a part that another run has left.
    part = next((run / "masks/default/data").glob("*.parquet"))
    part.write_bytes(next((made / "prepared").glob("part-*.parquet")).read_bytes())
    own = ["--from", f"{run}/masks/default/summary.json", f"run.dir={run}"]
    refused(1, f"`alphatoken mask {' '.join(own)}` makes it again", "trial.masks=default")
    before = part.read_bytes()
    assert alphatoken("mask", *own)[0] == 0 and part.read_bytes() != before  # as it says
    part.write_bytes(before)
    shutil.rmtree(run / "masks")
    refused(1, f"run `alphatoken mask --from {run}/run.json run.dir={run}` first")
    found, _, err = alphatoken("trial", f"run.dir={tmp_path}/none")
    assert found == 1 and "there is no such directory" in err.splitlines()[-1]


def test_a_validation_set_of_one_row_is_refused(alphatoken, tmp_path, policy, train_file):
    one = write_rows(tmp_path / "one.jsonl", [json.loads(train_file.read_text().splitlines()[0])])
    place = tmp_path / "r"
    arguments = [
        f"run.dir={place}",
        f"model.policy={policy}",
        f"data.train={train_file}",
        *SMALL,
        f"data.validation={one}",
    ]
    assert alphatoken("run", *arguments)[0] == 0
    status, _, err = alphatoken("trial", f"run.dir={place}", *QUICK)
    assert status == 1 and "at least 2 held-out rows" in err.splitlines()[-1]


def test_a_mask_that_keeps_nothing_of_the_sample_is_refused(alphatoken, run):
    masked = ["mask.score=information", "mask.rho=0.001", "mask.min_kept=0", "mask.always_keep=[]", "mask.name=nothing"]
    assert alphatoken("mask", f"run.dir={run}", *masked)[0] == 0
    status, _, err = alphatoken("trial", f"run.dir={run}", *QUICK, "trial.masks=nothing", "trial.examples=2")
    assert status == 1 and "keeps no token of the 2 rows" in err.splitlines()[-1], err


def test_retention_against_another_reference_is_measured_by_its_own_head(
    alphatoken, tmp_path, policy, reference, train_file
):
    place = tmp_path / "r"
    arguments = [
        f"run.dir={place}",
        f"model.policy={policy}",
        f"model.reference={reference}",
        f"data.train={train_file}",
    ]
    assert alphatoken("run", *arguments, *SMALL, "data.validation=8", "data.validation_trial=half")[0] == 0
    status, _, err = alphatoken("trial", f"run.dir={place}", *QUICK)
    assert status == 0, err
    assert next(row for row in results(place) if row["candidate"] == "untouched")["retention"] > 1e-3

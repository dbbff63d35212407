"""What is typed is read as it was meant, and words that set nothing are said with what was meant."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from alphatoken.jobs.config import load
from alphatoken.jobs.points import expand
from alphatoken.jobs.trial import _swept, of_the_run
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.spelling import overrides


@pytest.mark.parametrize(
    "name",
    [
        "train (1).jsonl",
        "a=b.jsonl",
        "it's.jsonl",
        'say "x".jsonl',
        "back\\slash(.jsonl",
        "ends(\\",
        "it\\'s.jsonl",
        "s3://b/x.jsonl?v=1",
        "naïve#1.jsonl",
        "müller.jsonl",
        "данные/строки.jsonl",
    ],
)
def test_a_path_is_taken_as_it_stands(name):
    assert load([f"data.train={name}"]).data.train == name


def test_a_home_directory_is_that_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load(["data.train=~/rows.jsonl", "run.dir=~/runs/a b"]).data.train == "/home/somebody/rows.jsonl"
    assert load(["data.train='~/rows.jsonl'"]).data.train == "~/rows.jsonl"  # quoted: Hydra's as it stands


def test_one_value_is_a_list_of_one():
    settings = load(["valuation.scores=loss", "trial.masks=noise", "trial.rho=0.5", "mask.extra_columns=loss_mask"])
    assert settings.valuation.scores == ["loss"] and settings.trial.masks == ["noise"] and settings.trial.rho == [0.5]
    assert settings.mask.extra_columns == ["loss_mask"] and load(["mask.always_keep=[]"]).mask.always_keep == []
    assert load(["data.train=[a.jsonl,b.jsonl]"]).data.train == ["a.jsonl", "b.jsonl"]


def test_text_that_looks_like_a_number_stays_text():
    settings = load(["model.revision=1.10", "run.dir=007", "mask.name=1e3"])
    assert (settings.model.revision, settings.run.dir, settings.mask.name) == ("1.10", "007", "1e3")
    assert load(["model.revision=null"]).model.revision is None and load(["mask.rho=0.30"]).mask.rho == 0.3


def test_text_that_looks_like_a_number_stays_text_in_sweeps_and_lists():
    points = expand(["mask.name=1.10,1.20,x", "mask.rho=0.5"])
    assert [load(point.overrides).mask.name for point in points] == ["1.10", "1.20", "x"]
    assert load(["trial.masks=1.10"]).trial.masks == ["1.10"] and load(["trial.rho=0.50"]).trial.rho == [0.5]
    kept = ["12", "true", "eos", 5, "it's", "1_0", "-.5e3"]
    (override,) = overrides({"mask.always_keep": kept})
    assert load([override]).mask.always_keep == kept
    several = {
        "model.revision": None,
        "valuation.exact": True,
        "mask.weights": {"code": 1, "a b": 0.5},
        "run.dir": "a,b",
    }
    settings = load(overrides(several))
    assert settings.model.revision is None and settings.valuation.exact and settings.run.dir == "a,b"
    assert settings.mask.weights == {"code": 1, "a b": 0.5}


def test_the_last_of_repeated_sweeps_holds_in_names_as_well():
    points = expand(["mask.rho=0.1,0.2", "mask.rho=0.3,0.5"])
    assert [point.name for point in points] == ["rho-0.3", "rho-0.5"]
    assert set(_swept(["mask.rho=0.3", "mask.rho=0.5"])) == {"rho-0.5"}
    with pytest.raises(SettingsWrong, match=r"several points of the sweep have mask.name=a"):
        _swept(["mask.name=a,b", "mask.rho=0.3,0.5"])


def test_the_last_of_repeated_keys_holds():
    assert load(["mask.rho=0.3", "mask.rho=0.4", "mask.rho=0.3"]).mask.rho == 0.3
    assert load(["mask=noise", "mask=paper", "mask=noise"]).mask == load(["mask=noise"]).mask


def test_a_sweep_reads_paths_as_a_run_does():
    points = expand(["data.train=train(1).jsonl", "mask.rho=0.3,0.5"])
    assert [load(point.overrides).data.train for point in points] == ["train(1).jsonl"] * 2
    assert [load(point.overrides).mask.rho for point in points] == [0.3, 0.5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("mask.rho = 0.5", ["mask.rho = 0.5: no blanks around the =: mask.rho=..."]),
        ("mask.rho =0.5", ["mask.rho =0.5: no blanks around the =: mask.rho=..."]),
        ("mask.rho 0.5", ["mask.rho 0.5: no blank between a key and its value: mask.rho=0.5"]),
        ("mask.rho", ["mask.rho: give a value: mask.rho=..."]),
        ("trial.masks=noise, paper", ["trial.masks=noise, paper: no blanks inside, or the whole in quotes: 'trial.masks=noise, paper'"]),
        ("mask.weights={code: 1}", ["mask.weights={code: 1}: no blanks inside, or the whole in quotes: 'mask.weights={code: 1}'"]),
        ("paper seed=1", ["paper: not a setting: give key=value", "seed=1: no such key; did you mean run.seed?"]),
        ("data.train=my file.jsonl", ["in quotes what has a blank: 'data.train=my file.jsonl'"]),
        ("trial.masks=[noise", ["trial.masks=[noise: it cannot be read: is a bracket or a quote left open"]),
        ("mask.rho=0.5)", ["mask.rho=0.5): Value '0.5)' of type 'str' could not be converted to Float"]),
        ("mask.rho=0.5,0.7)", ["mask.rho=0.5,0.7): it cannot be read"]),
    ],
)  # fmt: skip
def test_a_slip_is_said_in_the_words_of_the_command_line(words, said):
    for read in (load, expand):
        with pytest.raises(SettingsWrong) as error:
            read(words.split(" "))
        problems = error.value.problems
        if read is load:
            assert len(problems) == len(said)
            assert all(own in problem for own, problem in zip(said, problems, strict=True)), problems
        elif "no blank" in said[0]:
            assert said[0] in problems[0]


@pytest.mark.parametrize("name", ["s t", "s'(1)", "'s t'"])
def test_a_trial_finds_its_run_however_it_is_typed(tmp_path, name):
    place = tmp_path / name.strip("'") if name == "'s t'" else tmp_path / name
    place.mkdir()
    configuration = {**asdict(Settings()), "valuation": {**asdict(Settings())["valuation"], "layers": 1}}
    (place / "run.json").write_text(json.dumps({"configuration": configuration, "stages": {}}))
    typed = f"run.dir='{place}'" if name == "'s t'" else f"run.dir={place}"
    assert of_the_run([typed], None).valuation.layers == 1


def test_words_of_the_terminal_reach_it(alphatoken, tmp_path: Path):
    status, _, err = alphatoken("trial", f"run.dir={tmp_path}", "trial.masks=noise,", "paper")
    assert status == 2 and "no blanks inside" in err and "viable" not in err

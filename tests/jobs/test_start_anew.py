"""run.overwrite removes nothing before it is known that the work can be done again, and nothing of other commands."""

import json
import shutil
from pathlib import Path

import pytest

from tests.jobs.test_run import hashes
from tests.mask.synthetic_run import write_run


@pytest.fixture
def run(tmp_path, alphatoken) -> Path:
    """A run with values and two masks."""
    write_run(tmp_path / "run")
    for name in ("one", "two"):
        assert alphatoken("mask", f"run.dir={tmp_path}/run", f"mask.name={name}")[0] == 0
    shutil.rmtree(tmp_path / "run/.lock", ignore_errors=True)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("mask", ["run.overwrite=value"], "`alphatoken mask` would remove value and not make it"),
        ("report", ["run.overwrite=prepare"], "`alphatoken report` would remove prepare and not make it"),
        ("trial", ["run.overwrite=value"], "`alphatoken trial` would remove value and not make it"),
        ("mask", ["run.overwrite=mask", "mask.score=unrolled"], "valuation.schedule=own_step"),
        (
            "mask",
            ["-m", "run.overwrite=mask", "mask.score=unrolled", "mask.rho=0.2,0.3"],
            "valuation.schedule=own_step",
        ),
        ("mask", ["run.overwrite=mask", "mask.always_keep=[-1]"], "mask.always_keep=-1"),
        ("run", ["run.overwrite=value", "data.train=nosuch.jsonl"], "data.train=nosuch.jsonl: no such file"),
    ],
)
def test_what_cannot_be_made_anew_is_not_removed(alphatoken, run, policy, command, more, said):
    before = {name: own for name, own in hashes(run).items() if name.startswith(("prepared", "values", "masks"))}
    status, _, err = alphatoken(command, f"run.dir={run}", *[f"model.policy={policy}"] * (command == "run"), *more)
    assert status != 0 and said in err, err
    after = hashes(run)
    assert {name: after.get(name) for name in before} == before
    assert set(json.loads((run / "run.json").read_text())["stages"]) >= {"value", "mask/one", "mask/two"}


def test_the_masks_that_go_are_named(alphatoken, run):
    status, _, err = alphatoken("mask", f"run.dir={run}", "run.overwrite=mask", "mask.name=three")
    assert status == 0 and "masks that are removed: one, two" in err
    assert [place.name for place in (run / "masks").iterdir()] == ["three"]


def test_a_mask_that_differs_says_that_all_go(alphatoken, run):
    status, _, err = alphatoken("mask", f"run.dir={run}", "mask.name=one", "mask.rho=0.2")
    assert status == 2 and "make all masks of the run anew with run.overwrite=mask" in err

"""Commands in messages can be typed as they stand."""

import json
import shlex
from dataclasses import asdict

from alphatoken.jobs.config import load
from alphatoken.jobs.replay import recorded_configuration
from alphatoken.pipeline.run.remedies import again, anew
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import MaskSettings, Settings


def words(said: str) -> list[str]:
    return shlex.split(said.partition("`")[2].partition("`")[0])


def test_what_a_shell_or_hydra_would_read_otherwise_is_quoted(tmp_path):
    place = str(tmp_path / "a,b c")
    more = {"valuation.scores": ["paper", "loss"], "model.revision": None, "data.retention": ["x y.jsonl", "12"]}
    said = anew(place, "prepare", more)
    program, command, option, recorded, *overrides = words(said)
    assert (program, command, option, recorded) == ("alphatoken", "run", "--from", f"{place}/run.json")
    settings = load(overrides)
    assert settings.run.dir == place and settings.run.overwrite == "prepare"
    assert settings.valuation.scores == ["paper", "loss"] and settings.model.revision is None
    assert settings.data.retention == ["x y.jsonl", "12"]


def test_a_run_in_a_store_is_named_as_it_was_given_and_a_mask_there_is_read_with_its_run(tmp_path):
    place = (tmp_path / "run").as_uri()
    assert Storage(f"{place}/").place == place and Storage(str(tmp_path)).place == str(tmp_path)
    *_, option, recorded, override = words(again(Storage(place).place, "value"))
    assert (option, recorded) == ("--from", f"{place}/run.json") and load([override]).run.dir == place
    configuration = {**asdict(Settings()), "mask": asdict(MaskSettings(name="last"))}
    (tmp_path / "run/masks/own").mkdir(parents=True)
    (tmp_path / "run/run.json").write_text(json.dumps({"configuration": configuration}))
    own = {"settings": asdict(MaskSettings(name="own", rho=0.3))}
    (tmp_path / "run/masks/own/summary.json").write_text(json.dumps(own))
    found = recorded_configuration(f"{place}/masks/own/summary.json")
    assert found["mask"]["name"] == "own" and found["mask"]["rho"] == 0.3

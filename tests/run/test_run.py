"""The object that a stage is given."""

import io

import pytest
from rich.console import Console

from alphatoken.pipeline.run.fingerprint import of_model
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.run import Models, Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings


def test_models_and_cluster_are_looked_for_when_they_are_asked_for(tmp_path):
    asked = []
    models = Models(("first", "second"), "reference")

    def find() -> Models:
        asked.append("models")
        return models

    storage = Storage(str(tmp_path))
    run = Run(storage, Manifest(storage), Settings(), Progress(Console(file=io.StringIO())), find)
    assert asked == []
    assert run.models is models and run.models.policy == "first" and asked == ["models", "models"]
    with pytest.raises(RuntimeError, match="without a cluster"):
        _ = run.cluster


def test_what_killed_writers_left_is_removed_and_other_runs_below_are_let_be(tmp_path):
    left = [tmp_path / "values/.part.1.tmp", tmp_path / "masks/default/data/.train.2.tmp"]
    others = [tmp_path / "multirun/0/values/.part.3.tmp", tmp_path / "begun/.run.json.4.tmp"]
    for file in (*left, *others):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"half")
    (tmp_path / "multirun/0/run.json").write_text("{}")
    (tmp_path / "begun/.lock").mkdir()
    (tmp_path / "run.json").write_text("{}")
    Storage(str(tmp_path)).sweep()
    assert not any(file.exists() for file in left) and all(file.exists() for file in others)


def test_code_of_a_checkpoint_is_part_of_its_fingerprint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = [of_model(str(tmp_path), only) for only in (False, True)]
    (tmp_path / "modeling_own.py").write_text("SCALE = 2")
    first = of_model(str(tmp_path))
    (tmp_path / "modeling_own.py").write_text("SCALE = 3")
    assert len({before[0], first, of_model(str(tmp_path))}) == 3 and of_model(str(tmp_path), True) == before[1]

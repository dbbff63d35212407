"""The object that a stage is given."""

import io

import pytest
from rich.console import Console

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


def test_what_is_auto_until_the_kind_of_data_is_known_is_settled_in_a_run_of_its_own(tmp_path):
    storage = Storage(str(tmp_path))
    run = Run(storage, Manifest(storage), Settings(), Progress(Console(file=io.StringIO())))
    settled = run.for_data(pairs=True)
    assert settled.settings == Settings().for_data(True) and settled.storage is storage
    assert run.settings == Settings()
    with pytest.raises(AttributeError):
        run.settings = settled.settings  # type: ignore[misc]  # that is the test

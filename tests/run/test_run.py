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

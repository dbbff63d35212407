"""The plan's bytes device by device are those of the model as a worker lays it out."""

import json

import pytest
import torch

from alphatoken.jobs.cli import main
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.placement import Placement
from tests.conftest import SMALL

CPU = torch.device("cpu")


def held(parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


@pytest.fixture
def plan(policy, train_file, tmp_path, capfd):
    def made(*overrides: str) -> dict:
        own = [f"run.dir={tmp_path}/run", f"model.policy={policy}", f"data.train={train_file}", "data.validation=6"]
        assert main(["plan", *own, *SMALL, "valuation.layers=1", "model.dtype=float32", *overrides, "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    return made


def test_bytes_of_every_device(plan, policy):
    whole = plan()
    assert "devices" not in whole
    first, last = plan("cluster.gpus_per_worker=2", "model.lower_dtype=float32")["devices"]
    model = load_model(ModelSource(str(policy)), CPU)
    layers = list(model.model.layers)
    assert first == {
        "device": "0",
        "lower_layers": 2,
        "weights": held(p for layer in layers[:2] for p in layer.parameters()),
    }
    assert first["weights"] + last["weights"] == held(model.parameters()) == whole["memory_per_worker"]["weights"]
    assert last["lower_layers"] == 0 and last["directions"] == whole["memory_per_worker"]["directions"]
    hours, several = (plan(f"cluster.gpus_per_worker={n}")["device_hours"]["NVIDIA A100"] for n in (1, 4))
    assert several == pytest.approx(4 * hours)


def test_bytes_of_what_is_offloaded_and_of_what_is_narrower(plan, policy):
    each = held(load_model(ModelSource(str(policy)), CPU).model.layers[0].parameters())
    bound = plan()["memory_per_worker"]["weights"] - each  # room for all but the lower layers, and for one of them
    device, away = plan("model.offload=disk", f"model.device_bytes={bound}")["devices"]
    model = load_model(ModelSource(str(policy)), Placement((CPU,), 1, offload="disk", device_bytes=bound))
    assert device["weights"] == held(p for p in model.parameters() if not p.is_meta) + each <= bound
    assert away == {"device": "disk", "lower_layers": 2, "weights": 2 * each}
    (narrow,) = plan("model.lower_dtype=bfloat16")["devices"]
    model = load_model(ModelSource(str(policy)), Placement((CPU,), 1, "bfloat16"))
    assert narrow["weights"] == held(model.parameters())


def test_a_model_that_does_not_fit_is_refused_before_anything_is_started(policy, train_file, tmp_path, capfd):
    own = [f"run.dir={tmp_path}/run", f"model.policy={policy}", f"data.train={train_file}", *SMALL]
    assert main(["plan", *own, "model.device_bytes=1e3"]) == 2
    assert "the last device takes 1 KB of weights (model.device_bytes)" in capfd.readouterr().err

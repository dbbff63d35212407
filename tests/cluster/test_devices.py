"""Several GPUs per worker: which settings are refused, and what is said where there are fewer than asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphatoken.pipeline.anchor.loading import placement_of, worker_devices
from alphatoken.pipeline.cluster.cluster import check_gpus
from alphatoken.pipeline.cluster.inline import InlineCluster
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.settings import (
    AnchorSettings,
    ClusterSettings,
    ModelSettings,
    Settings,
    TrialSettings,
    ValuationSettings,
)
from alphatoken.pipeline.settings.unroll import UnrollSettings

ROOT = Path(__file__).parents[2]
ALL = AnchorSettings(direction="unrolled", unroll=UnrollSettings(layers="all"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(cluster=ClusterSettings(gpus_per_worker=2.5)), "gpus_per_worker=2.5: above 1 it must be a whole number"),
        (Settings(cluster=ClusterSettings(gpus_per_worker=-1)), "gpus_per_worker=-1: must be at least 0"),
        (Settings(model=ModelSettings(lower_dtype="int2")), "lower_dtype=int2: must be one of auto, float32, bfloat16"),
        (Settings(model=ModelSettings(offload="moon")), "model.offload=moon: must be one of none, cpu, disk"),
        (Settings(model=ModelSettings(device_bytes=0)), "model.device_bytes=0: must be at least 1"),
        (
            Settings(model=ModelSettings(lower_dtype="int4", offload="cpu")),
            "int4 layers cannot be offloaded: set model.offload=none, or model.lower_dtype=bfloat16",
        ),
        (
            Settings(cluster=ClusterSettings(gpus_per_worker=2), trial=TrialSettings(train="lora")),
            "trial.train=lora trains in all layers: set trial.train=layers, or leave cluster.gpus_per_worker=2 out",
        ),
        (
            Settings(
                model=ModelSettings(lower_dtype="int8"), anchor=ALL,
                valuation=ValuationSettings(schedule="own_step", scores=["loss"]),
            ),
            "anchor.unroll.layers=all trains all layers: set anchor.unroll.layers to a number of them, or leave model.lower_dtype=int8 out",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_refused_in_a_line(settings, said):
    (problem,) = settings.problems()
    assert said in problem


def test_all_stages_lay_the_same_layers_on_the_last_device():
    assert Settings(valuation=ValuationSettings(layers=2)).top_layers == 2
    more = AnchorSettings(direction="unrolled", unroll=UnrollSettings(layers=4))
    assert Settings(valuation=ValuationSettings(layers=2), anchor=more).top_layers == 4
    assert Settings(anchor=ALL).top_layers is None
    own = Settings(model=ModelSettings(offload="disk", device_bytes=7), valuation=ValuationSettings(layers=2))
    placement = placement_of(own)
    assert (placement.top, placement.offload, placement.rooms()) == (2, "disk", [7.0]) and not placement.whole
    assert placement_of(Settings()).whole


def test_lower_layers_are_bfloat16_on_several_devices_and_that_is_among_the_inputs():
    several = ClusterSettings(gpus_per_worker=2)
    assert Settings().lower_inputs == {} and Settings().lower_dtype == "auto"
    assert Settings(cluster=several).lower_dtype == "bfloat16"
    assert Settings(cluster=several, model=ModelSettings(lower_dtype="float32")).lower_dtype == "float32"
    assert Settings(cluster=several).lower_inputs == {"model.lower_dtype": "bfloat16 below the last 3 layers"}


def test_fewer_devices_than_asked_for_is_a_line_with_a_remedy():
    assert [str(one) for one in worker_devices(1)] == ["cpu"]
    with pytest.raises(RunFailed, match=r"gpus_per_worker=2: torch sees no GPU here .*: leave it out, and see model"):
        worker_devices(2)
    with pytest.raises(RunFailed, match=r"gpus_per_worker=2: this machine has no GPU that torch can use: leave it out"):
        InlineCluster(ClusterSettings(address="inline", gpus_per_worker=2), False).model_resources()
    check_gpus(2, [4, 2])
    check_gpus(0.5, [1])
    for asked, nodes, said in (
        (1, [0, 0], "the cluster has no GPU: start it with them .* or leave cluster.gpus_per_worker out"),
        (
            5,
            [4, 3],
            "has 7 GPUs, at most 4 on one node, and a worker lies on one node: set it to 4 at most, .*offload=cpu",
        ),
        (2, [1], "has 1 GPU, and a worker lies on one node: set it to 1 at most"),
    ):
        with pytest.raises(RunFailed, match=f"cluster.gpus_per_worker={asked}: .*{said}"):
            check_gpus(asked, nodes)


def test_workers_are_counted_node_by_node():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "tests.cluster.fake_gpus"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:6] == ["auto 8 1.0", "0.5 16 0.5", "1 8 1", "2 3 2", "3 2 3", "4 1 4"]
    assert lines[6].startswith("5 cluster.gpus_per_worker=5: the cluster has 8 GPUs, at most 4 on one node")

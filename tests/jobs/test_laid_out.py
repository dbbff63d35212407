"""Whole runs of a model whose lower layers are on the disk, or narrower: anchor, value, trial load it at one place."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from alphatoken.jobs.cli import main
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.placement import sizes_of
from tests.conftest import SMALL
from tests.jobs.test_run import hashes

HERE = [*SMALL, "cluster.address=inline", "valuation.layers=1", "data.validation=10"]
KINDS = {
    "supervised": ["valuation.exact=true", "data.validation_trial=half"],
    "unrolled": [
        "anchor.direction=unrolled", "anchor.unroll.steps=3", "anchor.unroll.examples=6", "anchor.unroll.batch_size=2",
        "anchor.unroll.orders=1", "anchor.unroll.snapshots=2", "data.validation=18",
    ],
    "rehearsal": ["valuation=rehearsal", "valuation.window=4", "valuation.rehearsal.batch_size=8"],
}  # fmt: skip
TRIAL = ["trial.seeds=1", "trial.steps=2", "trial.batch_size=2", "trial.examples=6"]


@pytest.fixture(scope="module")
def offloaded(policy) -> list[str]:
    """Settings with which both lower layers of the policy are on the disk."""
    model = load_model(ModelSource(str(policy)), torch.device("cpu"))
    sizes, rest = sizes_of(list(model.model.layers[:2]), model, "auto", torch.float32)
    return ["model.offload=disk", f"model.device_bytes={rest + max(sizes)}"]


def numbers(run: Path) -> dict[str, str]:
    kept = ("anchors/", "values/", "masks/", "trial/fine-tunes/", "trial/completions")
    return {name: one for name, one in hashes(run).items() if name.startswith(kept)}


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_lower_layers_leave_every_byte_as_it_is(tmp_path, capfd, policy, train_file, offloaded, kind):
    found = {}
    for name, more in (("whole", []), ("offloaded", offloaded)):
        run = tmp_path / "run"
        own = [f"run.dir={run}", f"model.policy={policy}", f"data.train={train_file}", *HERE, *KINDS[kind], *more]
        assert main(["run", *own]) == 0, capfd.readouterr().err
        if kind == "supervised":
            assert main(["trial", *own, *TRIAL]) == 0, capfd.readouterr().err
        said = capfd.readouterr().err
        assert "on the meta device" not in said
        counted = "value: 2 lower layer(s) are offloaded to disk and were brought back for every pass"
        assert (counted in said) == (name == "offloaded" and kind != "rehearsal")
        found[name] = numbers(run)
        logs = "".join(path.read_text() for path in (run / "logs").iterdir())
        assert ("lower layers: 2 offloaded to disk; all else: cpu" in logs) == (name == "offloaded")
        run.rename(tmp_path / name)
    assert found["offloaded"] == found["whole"] and len(found["whole"]) > 4
    assert (kind != "supervised") or any(name.startswith("trial/fine-tunes/") for name in found["whole"])


def test_narrower_lower_layers_are_among_the_inputs_of_a_run(tmp_path, capfd, policy, train_file):
    own = [f"run.dir={tmp_path}/run", f"model.policy={policy}", f"data.train={train_file}", *HERE]
    assert main(["run", *own]) == 0
    before = pq.read_table(tmp_path / "run/values").column("loss").to_pylist()
    assert main(["value", *own, "model.lower_dtype=bfloat16"]) == 2
    said = capfd.readouterr().err
    assert (
        "model.lower_dtype: bfloat16 below the last 1 layers, but the anchors were made with as model.dtype: make"
        in said
    )
    assert f"run.dir={tmp_path}/run model.lower_dtype=bfloat16 run.overwrite=anchor`" in said
    assert main(["run", *own, "model.lower_dtype=bfloat16", "run.overwrite=anchor"]) == 0, capfd.readouterr().err
    after = pq.read_table(tmp_path / "run/values").column("loss").to_pylist()
    one, other = (torch.tensor([x for row in rows for x in row]) for rows in (before, after))
    assert 0 < (one - other).abs().max() < 0.3 and torch.equal(one == 0, other == 0)
    inputs = json.loads((tmp_path / "run/run.json").read_text())["stages"]["anchor"]["inputs"]
    assert inputs["model.lower_dtype"] == "bfloat16 below the last 1 layers"


def test_a_run_that_gets_fewer_devices_goes_on_with_as_many_as_there_are(tmp_path, capfd, policy, train_file):
    own = [f"run.dir={tmp_path}/run", f"model.policy={policy}", f"data.train={train_file}", *HERE]
    for command in ("run", "anchor"):
        assert main([command, *own, "cluster.gpus_per_worker=2"]) == 1
        assert "cluster.gpus_per_worker=2: this machine has no GPU" in capfd.readouterr().err.splitlines()[-1]
    assert main(["run", *own]) == 0 and "prepare: done already" in capfd.readouterr().err


def test_a_model_that_does_not_fit_and_one_without_its_package_are_refused_in_a_line(
    tmp_path, capfd, policy, train_file
):
    own = [f"model.policy={policy}", f"data.train={train_file}", *HERE]
    for index, (more, status, said) in enumerate(
        (
            (["model.offload=disk", "model.device_bytes=1000"], 1, "and the last device takes 1 KB of weights"),
            (
                ["model.offload=cpu"],
                1,
                "model.offload=cpu: that is where the whole model lies already: set model.offload=disk",
            ),
            (
                ["cluster.gpus_per_worker=2"],
                1,
                "cluster.gpus_per_worker=2: this machine has no GPU that torch can use: leave",
            ),
            (["model.offload=disk", "model.lower_dtype=int8"], 2, "int8 layers cannot be offloaded"),
        )
    ):
        capfd.readouterr()
        assert main(["run", f"run.dir={tmp_path}/{index}", *own, *more]) == status
        assert said in capfd.readouterr().err.splitlines()[-1]

"""model.policy as a list of checkpoints: the mean over them, its bytes, interruptions, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from alphatoken.data_schemas import SCORES, value_columns, values_schema
from alphatoken.pipeline.anchor import stage as anchor
from alphatoken.pipeline.value import checkpoints as checkpoint_values
from tests.conftest import PREFERENCE, SMALL, save_model
from tests.jobs.test_run import hashes

NUMBERS = value_columns(list(SCORES), exact=True, reference_loss=True)
OWN = (
    "data.validation=6", "anchor.snapshot_scale=rms", "valuation.exact=true", "valuation.reference_loss=true",
)  # fmt: skip
ONLY_LOSS = ["valuation.scores=[loss]", "valuation.exact=false", "valuation.reference_loss=false", "mask.score=loss"]


@pytest.fixture(scope="module")
def later(tmp_path_factory) -> Path:
    """The second checkpoint: other weights in every layer."""
    return save_model(tmp_path_factory.mktemp("later"), seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_cluster, later, policy, reference, train_file):
    """A whole run with these checkpoints, once for each list and number of workers."""
    from alphatoken.jobs.cli import main

    runs: dict[tuple, Path] = {}

    def make(*checkpoints: Path, workers: int = 1) -> Path:
        if (checkpoints, workers) not in runs:
            run = tmp_path_factory.mktemp("checkpoints") / "run"
            assert main(["run", *command(run, checkpoints, reference, train_file, f"cluster.workers={workers}")]) == 0
            runs[checkpoints, workers] = run
        return runs[checkpoints, workers]

    return make


def command(run: Path, checkpoints, reference: Path, train: Path, *more: str) -> list[str]:
    named = ",".join(map(str, checkpoints))
    named = f"[{named}]" if len(checkpoints) > 1 else named
    same = [f"run.dir={run}", f"model.policy={named}", f"model.reference={reference}", f"data.train={train}"]
    return [*same, *SMALL, *OWN, *more]


def rows(place: Path) -> list[dict]:
    return [row for file in sorted(place.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_values_are_the_mean_over_checkpoints_that_are_each_run_alone(made, policy, later):
    both = made(policy, later)
    alone = [rows(made(one) / "values") for one in (policy, later)]
    apart = [rows(both / f"values/checkpoint-{index:02d}") for index in range(2)]
    found = rows(both / "values")
    assert len(found) == 31 and sorted(p.name for p in (both / "anchors").iterdir() if p.is_dir()) == [
        "snapshot-00", "snapshot-01",
    ]  # fmt: skip
    for mean, *singles, first, second in zip(found, *alone, *apart, strict=True):
        for name in NUMBERS:
            wanted = np.mean([np.array(single[name]) for single in singles], axis=0)
            scale = max(1e-9, np.abs(wanted).max())
            np.testing.assert_allclose(np.array(mean[name]) / scale, wanted / scale, atol=2e-6)
            parts = (np.array(first[name], np.float64) + np.array(second[name], np.float64)) / 2
            assert (np.array(mean[name], np.float32) == parts.astype(np.float32)).all()
        assert not np.allclose(first["adaptation_direct"], second["adaptation_direct"], rtol=0.05)


def test_each_checkpoint_has_its_own_directions_drift_and_scale(made, policy, later):
    both = made(policy, later)
    counts = json.loads((both / "run.json").read_text())["stages"]["anchor"]["counts"]
    assert counts["drift"] == "checkpoint" and counts["snapshots"] == 2
    for index, one in enumerate((policy, later)):
        alone = json.loads((made(one) / "run.json").read_text())["stages"]["anchor"]["counts"]["snapshot-00"]
        assert counts[f"snapshot-{index:02d}"] == pytest.approx(alone, rel=1e-5)
        assert alone["stability_norm"] > 0 and alone["adaptation_scale"] != 1
        assert not (both / f"anchors/snapshot-{index:02d}/policy.safetensors").exists()
    assert counts["snapshot-00"]["validation_loss"] != counts["snapshot-01"]["validation_loss"]


def test_the_bytes_do_not_depend_on_the_workers_but_on_the_order_and_every_checkpoint(made, policy, later):
    assert hashes(made(policy, later)) == hashes(made(policy, later, workers=2))


def test_a_run_that_is_interrupted_between_checkpoints_goes_on_there(
    alphatoken, made, tmp_path, policy, later, reference, train_file, monkeypatch
):
    """Once in anchor and once in value, each before the second checkpoint; the first is not done again."""
    run = tmp_path / "run"
    same = command(run, (policy, later), reference, train_file, "cluster.workers=1")
    snapshot, enter = anchor._Anchor._snapshot, checkpoint_values.checkpoint_place

    def stopped(self, pool, index, weights, drift):
        if index == 1:
            raise KeyboardInterrupt
        return snapshot(self, pool, index, weights, drift)

    def stopped_too(index):
        if index == 1:
            raise KeyboardInterrupt
        return enter(index)

    with monkeypatch.context() as patch:
        patch.setattr(anchor._Anchor, "_snapshot", stopped)
        assert alphatoken("run", *same)[0] == 130
    assert (run / "anchors/snapshot-00/stability.safetensors").exists() and not (run / "anchors/snapshot-01").exists()
    first = (run / "anchors/snapshot-00/stability.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_values, "checkpoint_place", stopped_too)
        assert alphatoken("run", *same)[0] == 130
    assert (run / "anchors/snapshot-00/stability.safetensors").stat().st_mtime_ns == first
    parts = sorted((run / "values/checkpoint-00").glob("*.parquet"))
    assert (
        len(parts) == 4 and not (run / "values/checkpoint-01").exists() and not list((run / "values").glob("*.parquet"))
    )
    times = [part.stat().st_mtime_ns for part in parts]
    status, _, err = alphatoken("run", *same)
    assert status == 0 and "checkpoint 1 of 2: 4 of 4 shards are complete already" in err, err
    assert [part.stat().st_mtime_ns for part in parts] == times
    assert hashes(run) == hashes(made(policy, later))


def test_a_part_that_is_gone_is_made_from_what_the_checkpoints_left(
    alphatoken, made, policy, later, reference, train_file
):
    run = made(policy, later)
    before, same = hashes(run), command(run, (policy, later), reference, train_file, "cluster.workers=1")
    (run / "values/part-00001-of-00004.parquet").unlink()
    (run / "values/part-00002-of-00004.parquet").unlink()
    (run / "values/checkpoint-01/part-00002-of-00004.parquet").unlink()
    status, _, err = alphatoken("run", *same)
    assert status == 0 and "checkpoint 2 of 2: 1 of 2 shards are complete already" in err, err
    assert hashes(run) == before


def test_other_checkpoints_are_other_inputs(alphatoken, made, tmp_path, policy, later, reference, train_file):
    run = shutil.copytree(made(policy, later), tmp_path / "run")
    for checkpoints in ((later, policy), (policy,)):
        status, _, err = alphatoken("run", *command(run, checkpoints, reference, train_file))
        assert status == 2 and "anchor: policy was" in err


def test_plan_report_replay_and_sweep_know_lists(alphatoken, made, tmp_path, policy, later, reference, train_file):
    run = made(policy, later)
    status, out, err = alphatoken("plan", *command(run, (policy, later), reference, train_file))
    assert status == 0 and "2 checkpoint(s)" in out and out.count("done, would be skipped") == 4, out + err
    plans = [
        json.loads(alphatoken("plan", "--json", *command(tmp_path / "p", some, reference, train_file))[1])
        for some in ((policy,), (policy, later))
    ]
    assert plans[1]["flops"]["value"]["flops"] == 2 * plans[0]["flops"]["value"]["flops"]
    written = sum(p.stat().st_size for p in (run / "values").rglob("*.parquet"))
    assert plans[1]["storage"]["values"] == pytest.approx(written, rel=0.25)
    assert (run / "report/index.html").read_text().count(str(later)) > 0
    status, _, err = alphatoken("run", "--from", run / "run.json", f"run.dir={tmp_path}/again")
    assert status == 0, err
    again = {name: sha for name, sha in hashes(tmp_path / "again").items() if not name.startswith("report/")}
    assert again == {name: sha for name, sha in hashes(run).items() if not name.startswith("report/")}
    swept = command(tmp_path / "s", (policy, later), reference, train_file)
    swept[1] = f"model.policy=[{policy},{later}],{policy}"
    status, out, err = alphatoken("run", "-m", *swept)
    assert status == 0, err
    assert len([p for p in (tmp_path / "s").iterdir() if (p / "masks").exists()]) == 2 and "the Fisher from" in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["anchor.drift=warmup"], "anchor.drift=warmup: the 2 checkpoints of model.policy are a trajectory already"),
        (["anchor.snapshots=2"], "anchor.snapshots=2: the 2 checkpoints of model.policy are the snapshots"),
        (ONLY_LOSS, "valuation.scores=[loss] score at one model"),
        (["model.reference=null"], "set model.reference to the model whose knowledge should stay"),
    ],
)
def test_what_makes_no_sense_with_several_checkpoints_is_refused(
    alphatoken, tmp_path, policy, later, reference, train_file, more, said
):
    status, _, err = alphatoken("run", *command(tmp_path / "r", (policy, later), reference, train_file, *more))
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_checkpoints_of_another_shape_are_refused_before_anything_runs(
    alphatoken, tmp_path, policy, reference, train_file
):
    deeper = save_model(tmp_path / "deeper", seed=1, layers=4)
    status, _, err = alphatoken("run", *command(tmp_path / "r", (policy, deeper), reference, train_file))
    assert status == 2 and f"model.policy: {deeper} differs from {policy} at" in err
    status, _, err = alphatoken("run", *command(tmp_path / "r", (policy, reference), deeper, train_file))
    assert status == 2 and f"model.reference: {deeper} differs" in err
    status, _, err = alphatoken("run", *command(tmp_path / "r", (policy, policy), reference, train_file))
    assert status == 2 and "twice" in err
    assert not (tmp_path / "r/prepared").exists()


def test_a_list_of_one_is_the_model_itself(alphatoken, made, policy, reference, train_file):
    run = made(policy)
    same = command(run, (policy,), reference, train_file)
    same[1] = f"model.policy=[{policy}]"
    status, _, err = alphatoken("run", *same)
    assert status == 0 and all(f"{stage}: done already" in err for stage in ("prepare", "anchor", "value"))
    schema = pq.read_schema(run / "values/part-00000-of-00004.parquet")
    assert schema.equals(values_schema(NUMBERS))
    assert schema.metadata[b"alphatoken.schema"] == values_schema(NUMBERS).metadata[b"alphatoken.schema"]


def test_pairs_are_the_mean_of_each_checkpoints_own_signed_values_and_omegas(
    alphatoken, tmp_path, preference_run, policy, later, reference, pairs_file
):
    found = {}
    for name, checkpoints in (("later", (later,)), ("both", (policy, later))):
        named = f"[{policy},{later}]" if len(checkpoints) == 2 else later
        same = [f"run.dir={tmp_path}/{name}", f"model.policy={named}", f"model.reference={reference}"]
        status, _, err = alphatoken("run", *same, f"data.train={pairs_file}", *SMALL, *PREFERENCE)
        assert status == 0, err
        found[name] = rows(tmp_path / name / "values")
    for both, one, two in zip(found["both"], rows(preference_run / "values"), found["later"], strict=True):
        assert both["omega"] == pytest.approx((one["omega"] + two["omega"]) / 2, rel=1e-5)
        for branch in ("chosen", "rejected"):
            for name in value_columns(list(SCORES)):
                wanted = (np.array(one[f"{branch}_{name}"]) + np.array(two[f"{branch}_{name}"])) / 2
                scale = max(1e-9, np.abs(wanted).max())
                np.testing.assert_allclose(np.array(both[f"{branch}_{name}"]) / scale, wanted / scale, atol=2e-6)
    logps = [rows(run / "reference") for run in (tmp_path / "both", preference_run)]
    assert logps[0] == logps[1]

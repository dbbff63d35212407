"""anchor.direction=unrolled through the command line on a tiny model: the same bytes however it was run, and what it says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from alphatoken.data_schemas import PREPARED
from alphatoken.pipeline.anchor import saving
from alphatoken.pipeline.anchor.stage import NO_ROWS
from alphatoken.pipeline.anchor.tape import kept_every, least_bytes, tape_bytes
from alphatoken.pipeline.anchor.tensors import counts_of
from alphatoken.pipeline.anchor.unrolled import HALVES, Held, points_of, rows_of_steps, steps_to_measure, units_of
from alphatoken.pipeline.anchor.worker import AnchorTask, AnchorWorker
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.prepare.reader import sequences_of
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.unroll import UnrollSettings
from tests.conftest import SMALL

UNROLLED = [
    "anchor=unrolled", "anchor.unroll.steps=6", "anchor.unroll.examples=16", "anchor.unroll.batch_size=4",
    "anchor.unroll.snapshots=2", "anchor.unroll.learning_rate=0.01", "data.shard_examples=20",
]  # fmt: skip
LORA = ("anchor.unroll.train=lora", "anchor.unroll.rank=4", "anchor.unroll.layers=2")  # those that are valued
WHOLE, BOUNDED = 10**9, 830_000  # bytes of the tape of 12 steps: each kept, and every fourth


@pytest.fixture(scope="module")
def common(policy, train_file, twenty_rows) -> list[str]:
    return [f"model.policy={policy}", f"data.train={train_file}", f"data.validation={twenty_rows}", *SMALL, *UNROLLED]


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_cluster, common):
    """Prepare and anchor with overrides, once per set of them."""
    from alphatoken.jobs.cli import main

    runs: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in runs:
            run = tmp_path_factory.mktemp("unrolled")
            for stage in ("prepare", "anchor"):
                assert main([stage, f"run.dir={run}", *common, *overrides]) == 0
            runs[overrides] = run
        return runs[overrides]

    return make


def anchors(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted((run / "anchors").rglob("*.safetensors"))}


def counts(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())["stages"]["anchor"]["counts"]


@pytest.mark.parametrize("own", [(), LORA])
def test_each_order_has_its_snapshots_and_the_value_stage_takes_their_mean(made, common, alphatoken, own):
    run, common = made(*own), [*common, *own]
    places = [run / f"anchors/snapshot-{index:02d}" for index in range(4)]
    assert counts(run)["snapshots"] == 4 and not (run / "anchors/partial").exists()
    for place in places:
        for kind in ("adaptation", "stability", "policy"):
            found = load_file(place / f"{kind}.safetensors")
            assert all(bool(t.any()) and bool(torch.isfinite(t).all()) for t in found.values())
    start, later, other = (load_file(places[i] / "policy.safetensors") for i in (0, 1, 2))
    assert not any(torch.equal(start[name], later[name]) for name in start)
    assert not any(torch.equal(start[name], other[name]) for name in start)  # after one step over other rows
    status, _, err = alphatoken("value", f"run.dir={run}", *common)
    assert status == 0, err
    rows = [row for file in sorted((run / "values").glob("part-*")) for row in pq.read_table(file).to_pylist()]
    assert any(any(row["adaptation_direct"]) for row in rows) and any(any(row["stability_direct"]) for row in rows)
    status, out, err = alphatoken("mask", f"run.dir={run}", "mask=paper", *common)
    assert status == 0, err
    assert "plain alignment" not in out + err


@pytest.mark.parametrize(("own", "workers"), [((), 1), ((), 2), (LORA, 2)])
def test_the_same_bytes_whatever_the_number_of_workers(made, own, workers):
    assert anchors(made(*own)) == anchors(made(*own, f"cluster.workers={workers}"))


def test_the_same_bytes_whatever_the_bound_of_the_tape(made):
    """Of twelve steps every fourth state is kept, and the steps between are made again."""
    longer = ("anchor.unroll.steps=12", "anchor.unroll.orders=1")
    whole, bounded = made(*longer), made(*longer, f"anchor.unroll.tape_bytes={BOUNDED}")
    assert [counts(run)["order-00"]["tape_every"] for run in (whole, bounded)] == [1, 4]
    assert anchors(whole) == anchors(bounded)


@pytest.mark.parametrize(
    ("train", "bounds"),
    [
        ("weights", (WHOLE, WHOLE)),
        ("weights", (WHOLE, BOUNDED)),
        ("weights", (BOUNDED, WHOLE)),
        ("lora", (WHOLE, WHOLE)),
    ],
)
@pytest.mark.parametrize("half", ["forward", "sweep"])
def test_a_killed_run_goes_on_from_its_last_saved_step_whatever_the_bound_of_the_tape_is_now(
    made, policy, tmp_path, monkeypatch, half, train, bounds
):
    """The task itself is cut off in the middle of a half, in this process, and begun again."""
    whole = made()
    shutil.copytree(whole, tmp_path / "run")
    storage = Storage(str(tmp_path / "run"))
    for index in range(4):
        storage.remove(f"anchors/snapshot-{index:02d}")
    settings = Settings()
    unroll = replace(
        settings.anchor.unroll, steps=12, examples=16, batch_size=4, snapshots=2, learning_rate=0.01, train=train, layers=2
    )  # fmt: skip
    settings = replace(
        settings,
        anchor=replace(settings.anchor, direction="unrolled", unroll=unroll),
        valuation=replace(settings.valuation, layers=2, window=4, schedule="own_step"),
    )
    monkeypatch.setattr(saving.time, "monotonic", lambda: 0.0)  # saved at every step

    def worker_of(bound: int) -> AnchorWorker:
        anchor = replace(settings.anchor, unroll=replace(unroll, tape_bytes=bound))
        return AnchorWorker(storage, ModelSource(str(policy)), replace(settings, anchor=anchor), [2])

    worker = worker_of(bounds[0])
    worker(AnchorTask("weights", "anchors/partial/reference.safetensors", NO_ROWS), lambda n: None)
    table = storage.read_table("prepared/part-00000-of-00002.parquet", PREPARED)
    held = Held.of(sequences_of(storage.read_table("prepared/validation.parquet", PREPARED)))
    output = "anchors/partial/unroll-00.safetensors"
    task = AnchorTask(
        "unroll", output, sequences_of(table).part(0, 1), fingerprint="f", drift="warmup", held={"adaptation": held}
    )  # fmt: skip

    class Killed(Exception):
        pass

    done: list[int] = []

    def until(last: int):
        def advance(units: int) -> None:
            done.append(units)
            if sum(done) == last:
                raise Killed

        return advance

    with pytest.raises(Killed):
        worker(task, until(7 if half == "forward" else 16))
    assert counts_of(storage, f"anchors/partial/unroll-{half}-00.safetensors", "f") is not None
    done.clear()
    worker = worker_of(bounds[1])
    again = worker(task, until(-1))
    assert (again["tape_every"] > 1) == (bounds[1] == BOUNDED)
    assert done[0] == (7 if half == "forward" else 12)
    assert sum(done) == units_of(unroll, {"adaptation": held})
    found = {i: load_file(tmp_path / f"run/anchors/partial/gradient-{i:02d}.safetensors") for i in range(2)}
    own_steps = load_file(tmp_path / "run/anchors/own-step-00.safetensors")
    storage.remove("anchors/partial")
    worker(AnchorTask("weights", "anchors/partial/reference.safetensors", NO_ROWS), lambda n: None)
    assert worker(task, lambda n: None) == again
    for index, tensors in found.items():
        fresh = load_file(tmp_path / f"run/anchors/partial/gradient-{index:02d}.safetensors")
        for name, tensor in tensors.items():
            assert tensor.any() and torch.equal(tensor, fresh[name])
    for name, tensor in load_file(tmp_path / "run/anchors/own-step-00.safetensors").items():
        assert tensor.any() and torch.equal(tensor, own_steps[name])


def test_a_wrong_request_is_refused_in_one_line_that_names_the_remedy(alphatoken, common, validation_file, tmp_path):
    def refused(*overrides: str, status: int = 2) -> str:
        got, _, err = alphatoken("run", f"run.dir={tmp_path / 'r'}", *common, *overrides)
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        assert got == status and "Traceback" not in err, err
        return err.strip().splitlines()[-1]

    assert "a run of one step is anchor.direction=gradient" in refused("anchor.unroll.steps=1")
    assert "fewer than one batch" in refused("anchor.unroll.examples=3")
    assert "anchor.unroll.train=adapters: must be one of weights, lora" in refused("anchor.unroll.train=adapters")
    assert "anchor.unroll.rank=0: must be at least 1" in refused("anchor.unroll.rank=0")
    assert "has fewer points" in refused("anchor.unroll.snapshots=7")
    assert "set anchor.precondition=none" in refused("anchor.precondition=kfac")
    assert "anchor.unroll.snapshots" in refused("anchor.snapshots=2", "anchor.drift=warmup")
    assert "at least 16 (with data.validation_trial=half twice that), better 100, or set anchor.dir" in refused(
        f"data.validation={validation_file}"
    )
    assert "needs at least" in refused("anchor.unroll.tape_bytes=100", status=1)
    assert "learning_rate" in (line := refused("anchor.unroll.learning_rate=1e30", status=1)) and "step 2 of 6" in line
    assert "there are 37 training examples" in refused(
        "anchor.unroll.batch_size=38", "anchor.unroll.examples=38", status=2
    )


def test_few_validation_rows_are_warned_of_and_the_fall_on_rows_left_out_is_told(alphatoken, common, tmp_path):
    assert alphatoken("prepare", f"run.dir={tmp_path}", *common)[0] == 0
    status, out, err = alphatoken("anchor", f"run.dir={tmp_path}", *common)
    assert status == 0, err
    said = out + err
    assert "warning: 20 validation rows are few" in said
    assert "on the 18 rows that made the direction" in said and "on 2 others" in said
    assert "; 2 rows are too few to go by, `alphatoken trial` has others)" in said


def test_the_time_that_measuring_takes_is_part_of_the_total():
    """So that the display does not stand at nothing left while rows are measured after the last step."""
    rows = Sequences([str(i) for i in range(50)], [[1, 2]] * 50, [[-100, 2]] * 50)
    held, unroll = {"adaptation": Held.of(rows)}, Settings().anchor.unroll
    assert (len(held["adaptation"].made), len(held["adaptation"].left_out)) == (45, 5)
    assert [steps_to_measure(n, 8) for n in (0, 1, 24, 25, 45)] == [0, 1, 1, 2, 2]
    assert units_of(unroll, held) == HALVES * unroll.steps + 3 * (2 + 1)
    assert units_of(unroll, {**held, "retention": held["adaptation"]}) == units_of(unroll, held)  # not measured


def test_the_tape_fits_its_bound():
    assert kept_every(27, 1000, 27 * 4000) == 1
    for bound in range(least_bytes(27, 1000), 27 * 4000, 1000):
        every = kept_every(27, 1000, bound)
        assert every is not None and every > 1 and tape_bytes(27, every, 1000) <= bound
    assert kept_every(27, 1000, least_bytes(27, 1000) - 1) is None


def test_points_are_the_middles_of_equal_parts_and_orders_are_epochs_of_their_own():
    assert points_of(27, 5) == [2, 8, 13, 18, 24] and points_of(1, 1) == [0] and points_of(6, 6) == list(range(6))
    unroll = UnrollSettings(steps=5, batch_size=5)
    one, other, again, seeded = (rows_of_steps(10, unroll, *own) for own in ((0, 0), (0, 1), (0, 0), (1, 0)))
    assert one != other and one == again != seeded and [len(rows) for rows in one] == [5] * 5
    drawn = sum(one, [])
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))

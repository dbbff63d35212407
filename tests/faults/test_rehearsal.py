"""A rehearsal whose drivers and workers are killed ends with the bytes of a calm one."""

import threading
import time

import psutil
import pytest

from tests.faults.interrupted_run import calm_run, contents, family, inputs_in, python, until, without_ray

# Directions are older than the last save at most steps, so that a state has to bring them.
REHEARSAL = [
    "valuation=rehearsal", "valuation.layers=2", "valuation.window=4", "anchor.snapshots=1", "data.shard_examples=12",
    "valuation.rehearsal.batch_size=4", "valuation.rehearsal.refresh=3", "valuation.rehearsal.save_every=2",
    "valuation.rehearsal.learning_rate=0.002", "valuation.tokens_per_batch=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    return [*inputs_in(tmp_path_factory.mktemp("inputs")), *REHEARSAL]


@pytest.fixture(scope="module")
def calm(tmp_path_factory, inputs) -> dict:
    return calm_run(tmp_path_factory.mktemp("calm"), inputs)


def test_thirty_killed_drivers_give_the_bytes_of_a_calm_run(tmp_path, inputs, calm):
    told = without_ray(30, 5, "run", f"run.dir={tmp_path}/run", *inputs)
    assert told["kills"] == 30 and told["status"] == 0
    assert told["unfinished"] >= 15, "the kills came too late to test anything"
    assert contents(tmp_path / "run") == calm


def test_a_killed_driver_goes_on_from_its_last_save(tmp_path, inputs, calm):
    calm = dict(calm)
    run = tmp_path / "run"
    process = python("alphatoken.jobs", "run", f"run.dir={run}", *inputs)
    state = run / "values/rehearsal/state.safetensors"
    until(state.exists, 240, every=0.001)
    for member in family(process):
        member.kill()
    process.communicate(timeout=60)
    assert state.exists() and not list((run / "values").glob("part-*"))
    process = python("alphatoken.jobs", "run", f"run.dir={run}", *inputs, "cluster.workers=2")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    told = next(line for line in err.splitlines() if "goes on from step" in line)
    assert int(told.split("from step ")[1].split()[0]) >= 2
    found = contents(run)
    for one in (found, calm):
        manifest = dict(one["run.json"])
        one["run.json"] = {
            **manifest,
            "configuration": {**manifest["configuration"], "cluster": None},
        }  # 1 and 2 workers
    assert found == calm


def test_lost_workers_cost_the_steps_since_the_last_save_at_most(alphatoken, tmp_path, inputs, calm):
    """A worker dies, and later all of them, with what they had put into the store; the same driver ends with the bytes of a
    calm run."""
    kills: list[int] = []
    over, run = threading.Event(), tmp_path / "run"

    def hit() -> None:
        for saved in range(1, 3):
            while not over.is_set() and len(list((run / "values/rehearsal").glob("steps-*"))) < saved:
                time.sleep(0.002)
            workers = [one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::Host")]
            for process in workers[: 1 if saved == 1 else None]:
                if not over.is_set():
                    process.kill()
                    kills.append(process.pid)

    killer = threading.Thread(target=hit)
    killer.start()
    try:
        status, _, err = alphatoken("run", f"run.dir={run}", *inputs)
    finally:
        over.set()
        killer.join()
    assert status == 0, err
    assert len(kills) >= 2 and "its worker was lost" in err
    back = [line for line in err.splitlines() if "the rehearsal goes back to step" in line]
    assert back and f"went back to a save {len(back)} times, for what was lost with a worker" in err, err
    assert contents(run) == calm

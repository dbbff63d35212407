"""A run that is killed again and again, in each of the ways in which machines do it, ends with the bytes of a calm one."""

import random
import signal
import threading
import time

import psutil
import pytest

from tests.faults.interrupted_run import calm_run, contents, family, inputs_in, python, until, without_ray


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    return inputs_in(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory, inputs) -> dict:
    return calm_run(tmp_path_factory.mktemp("calm"), inputs)


def test_thirty_killed_drivers_give_the_bytes_of_a_calm_run(tmp_path, inputs, calm):
    told = without_ray(30, 5, "run", f"run.dir={tmp_path}/run", *inputs)
    assert told["kills"] == 30 and told["status"] == 0
    assert told["unfinished"] >= 20, "the kills came too late to test anything"
    assert contents(tmp_path / "run") == calm


def test_killed_drivers_of_a_run_that_cuts_its_own_shards_give_the_bytes_of_a_calm_one(tmp_path, inputs):
    """With data.shard_examples=auto, which every attempt has to settle as the first one did."""
    own = [*(one for one in inputs if not one.startswith("data.shard_examples=")), "data.shard_examples=auto"]
    calm = calm_run(tmp_path / "calm", own)
    told = without_ray(10, 8, "run", f"run.dir={tmp_path}/run", *own)
    assert told["kills"] == 10 and told["unfinished"] >= 6 and told["status"] == 0
    assert contents(tmp_path / "run") == calm


def test_killed_drivers_and_machines_with_ray_go_on_with_the_same_command(tmp_path, inputs, calm):
    """In turn the driver alone, as by a user, and everything below it at once, as when a machine goes away."""
    draw, run = random.Random(7), tmp_path / "run"
    for turn in range(4):
        process = python("alphatoken.jobs", "run", f"run.dir={run}", *inputs)
        until((run / ".lock").exists, 120)
        time.sleep(draw.uniform(0.0, 14.0))
        for member in family(process)[: 1 if turn % 2 else None]:
            member.kill()
        process.communicate(timeout=60)
    process = python("alphatoken.jobs", "run", f"run.dir={run}", *inputs)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert contents(run) == calm


def test_a_killed_ray_head_or_only_node_ends_the_driver_and_the_same_command_goes_on(tmp_path, inputs):
    """With two CPUs for each worker of a model: anchor has to start its own, and a Ray that is gone cannot."""
    run, own = tmp_path / "run", [*inputs, "cluster.cpus_per_worker=2"]
    # The head first: it is missed after some seconds, in which what is left of a run could come to its end. Not before there
    # are workers: a Ray that does not start is started once more.
    for victim, begun in (("gcs_server", ".lock/*.json"), ("raylet", "prepared/part-*")):
        process = python("alphatoken.jobs", "run", f"run.dir={run}", *own, RAY_gcs_rpc_server_reconnect_timeout_s="3")
        until(lambda begun=begun: list(run.glob(begun)), 120)
        until(lambda of=process: [p for p in family(of) if _is_worker(p)], 120)
        found = until(lambda of=process, name=victim: [p for p in family(of) if p.name() == name], 120)
        assert len(found) == 1
        found[0].kill()
        _, err = process.communicate(timeout=120)
        assert process.returncode != 0
        assert victim != "raylet" or "run the same command again" in err, err
    for place in (run, tmp_path / "calm/run"):
        process = python("alphatoken.jobs", "run", f"run.dir={place}", *own)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert contents(run) == contents(tmp_path / "calm/run")


def test_killed_workers_are_replaced(alphatoken, tmp_path, inputs, calm):
    """Ten kills at random moments; a shard that was hit three times is reported, and done by the next run."""
    draw, kills, over = random.Random(3), [], threading.Event()

    def hit() -> None:
        while len(kills) < 10 and not over.wait(draw.uniform(0.3, 2.5)):
            workers = [p for p in psutil.Process().children(recursive=True) if _is_worker(p)]
            if workers:
                victim = draw.choice(workers)
                victim.send_signal(signal.SIGKILL)
                kills.append(victim.pid)

    killer = threading.Thread(target=hit)
    killer.start()
    try:
        for _ in range(6):
            status, _, err = alphatoken("run", f"run.dir={tmp_path}/run", *inputs)
            if status == 0:
                break
            assert "run the same command again" in err or "workers die while they start" in err, err
    finally:
        over.set()
        killer.join()
    assert status == 0
    assert len(kills) >= 3
    assert contents(tmp_path / "run") == calm


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] == ["ray::Host"] or process.name().startswith("ray::Host")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path, inputs):
    run = tmp_path / "run"
    first = python("alphatoken.jobs", "run", f"run.dir={run}", *inputs)
    try:
        until(lambda: list(run.glob(".lock/*.json")), 120)
        second = python("alphatoken.jobs", "prepare", f"run.dir={run}", *inputs)
        _, err = second.communicate(timeout=120)
        assert second.returncode == 1 and f"process {first.pid} on" in err.strip().splitlines()[-1]
    finally:
        for member in family(first):
            member.kill()
        first.communicate(timeout=60)

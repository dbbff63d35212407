"""The shard loop against workers that die, hang and fail, as real processes."""

import gc
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from alphatoken.pipeline.cluster.cluster import Cluster
from alphatoken.pipeline.cluster.pool import WorkerPool
from alphatoken.pipeline.cluster.work import ATTEMPTS, Resources, Shard
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.settings import ClusterSettings


class Square:
    """Squares numbers; misbehaves as its payload says, the first time or always."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def __call__(self, payload, advance):
        number, fault = payload
        marker = self.directory / f"seen-{number}"
        first = not marker.exists()
        marker.touch()
        if fault == "die always" or (fault == "die once" and first):
            os._exit(9)
        if fault == "hang once" and first:
            time.sleep(3600)
        if fault == "fail":
            raise RunFailed("this number is odd")
        advance(1)
        return number * number


def run(directory: Path, faults: dict[int, str], workers: int = 2, timeout: float = 60.0) -> dict[str, int]:
    shards = [Shard(f"shard {n}", 1) for n in range(8)]
    results: dict[str, int] = {}
    with (
        Progress(Console(file=open(os.devnull, "w"))) as progress,
        WorkerPool(Square, {"directory": str(directory)}, Resources(workers, 1, 0.0), timeout, False) as pool,
        progress.task("squares", 8, "numbers") as task,
    ):
        pool.run(
            shards, lambda s: (int(s.name.split()[1]), faults.get(int(s.name.split()[1]), "")),
            lambda s, r: results.__setitem__(s.name, r), task,
        )  # fmt: skip
    return results


EVERY = {f"shard {n}": n * n for n in range(8)}


def test_runs_every_shard_once(ray_cluster, tmp_path):
    assert run(tmp_path, {}) == EVERY


def test_a_lost_actors_shards_are_queued_again(ray_cluster, tmp_path):
    assert run(tmp_path, {2: "die once", 5: "die once"}) == EVERY


def test_a_shard_that_always_kills_its_worker_is_set_aside_and_the_others_are_finished(ray_cluster, tmp_path):
    with pytest.raises(RunFailed, match=r"1 shard\(s\) failed 3 times .* shard 3: its worker was lost"):
        run(tmp_path, {3: "die always"})
    assert {p.name for p in tmp_path.glob("seen-*")} == {f"seen-{n}" for n in range(8)}


def test_a_hung_worker_is_replaced(ray_cluster, tmp_path):
    assert run(tmp_path, {1: "hang once"}, timeout=8.0) == EVERY


def test_an_error_names_the_shard_and_stops(ray_cluster, tmp_path):
    with pytest.raises(RunFailed, match="shard 4: this number is odd"):
        run(tmp_path, {4: "fail"})


class Meets:
    """Ends when as many processes as its payload says have a shard each."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def __call__(self, payload, advance):
        (self.directory / str(os.getpid())).touch()
        end = time.monotonic() + 60
        while len(list(self.directory.iterdir())) < payload:
            if time.monotonic() > end:
                raise RunFailed("alone")
            time.sleep(0.05)


def test_nobody_has_two_shards_while_a_worker_that_is_to_come_has_none(ray_cluster, tmp_path):
    """A worker that is there before the others would take two long shards, one after the other."""
    with (
        Progress(Console(file=open(os.devnull, "w"))) as progress,
        WorkerPool(Meets, {"directory": str(tmp_path)}, Resources(2, 1, 0.0), 90.0, False) as pool,
        progress.task("shards", 3, "numbers") as task,
    ):
        pool.run([Shard("before", 1)], lambda s: 1, lambda s, r: None, task)
        assert len(pool.hosts.all) == 1
        pool.run([Shard(name, 1) for name in ("one", "two")], lambda s: 2, lambda s, r: None, task)


class Whose:
    """Tells its process, and how many workers of its kind live there; fails where it is asked to."""

    def __call__(self, payload, advance):
        if payload == "fail":
            raise RunFailed("as asked")
        time.sleep(0.2)  # so that a second worker gets its share
        return os.getpid(), sum(isinstance(each, Whose) for each in gc.get_objects())


def processes(cluster: Cluster, resources: Resources, shards: int = 8, payload: str = "") -> set[int]:
    found = []
    with (
        Progress(Console(file=open(os.devnull, "w"))) as progress,
        cluster.pool(Whose, {}, resources) as pool,
        progress.task("processes", shards, "numbers") as task,
    ):
        pool.run([Shard(str(n), 1) for n in range(shards)], lambda s: payload, lambda s, r: found.append(r), task)
    assert len(found) == shards and {alive for _, alive in found} == {1}
    return {process for process, _ in found}


@pytest.fixture
def cluster(ray_cluster):
    with Cluster(ClusterSettings(shard_timeout=60.0), False) as cluster:
        yield cluster


def test_the_next_pool_of_the_same_shape_works_in_the_same_processes_and_no_worker_is_left_in_them(cluster):
    first = processes(cluster, Resources(1, 1, 0.0))
    assert len(first) == 1 and processes(cluster, Resources(1, 1, 0.0)) == first
    both = processes(cluster, Resources(2, 1, 0.0), shards=40)
    assert both > first
    other = processes(cluster, Resources(1, 2, 0.0))
    assert len(other) == 1 and not other & both and not any(map(lives, both))
    cluster.__exit__()
    assert not any(map(lives, other))


def test_another_run_of_the_same_process_gets_the_cpus_of_idle_hosts(cluster):
    """As in a sweep over run directories: each has a Cluster, and all are open until the last point."""
    all_cpus = Resources(1, 2, 0.0)
    before = processes(cluster, all_cpus)
    cluster.end_idle()
    with Cluster(ClusterSettings(shard_timeout=30.0), False) as other:
        assert not processes(other, all_cpus) & before


def test_no_process_outlives_a_pool_that_failed(cluster):
    one = Resources(1, 1, 0.0)
    before = processes(cluster, one)
    with pytest.raises(RunFailed, match="as asked"):
        processes(cluster, one, payload="fail")
    assert not any(map(lives, before)) and not processes(cluster, one) & before


def test_processes_that_died_between_two_pools_cost_no_attempt(cluster):
    """More of them than starts may fail in a row, as with a node: the run goes on in new ones."""
    many = Resources(ATTEMPTS + 1, 0, 0.0)
    before = processes(cluster, many, shards=80)
    assert len(before) >= ATTEMPTS
    for process in before:
        os.kill(process, signal.SIGKILL)
    assert not processes(cluster, many) & before


def lives(process: int) -> bool:
    """Whether a process is there within some seconds of being killed."""
    for _ in range(50):
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.1)
    return True

"""The shard loop against workers that die, hang and fail, as real processes."""

import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.stages.failure import RunFailed
from pipeline.stages.progress import Progress
from pipeline.stages.shard_loop import Resources, Shard, WorkerPool


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

"""What a shard costs the driver, and what a resume over finished ones costs: `python -m benchmarks.shards --shards 1000 10000 100000`.

The shard loop of every stage, over workers that write a tiny part of values/ and return what a value worker returns; then
the look at all of them that a stage begins with when it goes on. No model is loaded, so that what is left is the driver.
Each number of shards is a row, so that growth is seen. Memory is the driver's resident set at the end of the shards, and
once more with what the look at all of them returns, less that at the start of the row; the first row has what grows once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import pyarrow as pa
import ray
from rich.console import Console

from alphatoken.pipeline.cluster.cluster import Cluster
from alphatoken.pipeline.cluster.host import Resources
from alphatoken.pipeline.cluster.shard_loop import Shard
from alphatoken.pipeline.run.noted import Notes
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import ClusterSettings
from alphatoken.pipeline.value.stage import COUNTED, added_up

SCHEMA = pa.schema([("id", pa.string()), ("loss", pa.list_(pa.float32()))])
TINY = pa.table({"id": ["row"], "loss": [[1.0, 2.0]]}, schema=SCHEMA)
COUNTS = {"tokens": 2, "padded_tokens": 2, "engine": {"rows": 3, "hidden": 1e-7, "logits": 1e-7, "causal_layers": 3}}
TOKENS = 10


@dataclass(frozen=True, slots=True)
class Payload:
    """What a worker is handed: the part to write."""

    part: str
    fingerprint: str


class TinyWorker:
    """Writes a part of one row."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def __call__(self, payload: Payload, advance: Callable[[int], None]) -> dict[str, Any]:
        self.storage.write_table(f"values/{payload.part}", TINY, payload.fingerprint, COUNTS)
        advance(TOKENS)
        return COUNTS


def measure(shards: int, cluster: Cluster, workers: int, place: str) -> None:
    """Print the row of one number of shards."""
    storage = Storage(place)
    results: list[dict[str, Any]] = []
    landed: list[float] = []  # when the first did
    progress = Progress(Console(quiet=True))
    driver = psutil.Process()

    notes = Notes(storage, "values", "own", shards)

    def done(shard: Shard, result: dict[str, Any]) -> None:
        notes.add(shard.name, 1, {key: result[key] for key in COUNTED})
        landed[:] = landed or [time.perf_counter()]
        results[:] = [{**added_up([*results, result]), "shards": 1 + (results[0]["shards"] if results else 0)}]

    before, cpu, wall = driver.memory_info().rss, time.process_time(), time.perf_counter()
    names = [f"part-{index:06d}-of-{shards:06d}.parquet" for index in range(shards)]
    with (
        cluster.pool(TinyWorker, {"storage": storage}, Resources(workers, 1, 0.0)) as pool,
        progress.task("shards", shards * TOKENS, "tokens") as task,
    ):
        pool.run(
            [Shard(name, TOKENS) for name in names], lambda shard: Payload(shard.name, "own"),
            done, task,
        )  # fmt: skip
    notes.write()
    began = wall
    cpu, wall, grown = time.process_time() - cpu, time.perf_counter() - wall, driver.memory_info().rss - before
    assert results[0]["shards"] == shards
    looked_cpu, looked = time.process_time(), time.perf_counter()
    there = storage.footers("values", names, "own")
    assert len(there) == shards
    looked_cpu, looked = time.process_time() - looked_cpu, time.perf_counter() - looked
    known = driver.memory_info().rss - before
    each = f"{1e3 * cpu / shards:.2f} | {grown / shards / 1024:.2f} | {1e3 * wall / shards:.2f}"
    resumed = f"{looked:.1f} | {looked_cpu:.1f} | {known / shards / 1024:.2f}"
    print(f"| {shards:,} | {landed[0] - began:.1f} | {each} | {resumed} |", flush=True)


@ray.remote
class Sleeper:
    """Keeps calls waiting, or answers."""

    def nap(self) -> None:
        """For as long as the benchmark lasts."""
        time.sleep(3600)

    def answer(self) -> int:
        """At once."""
        return 1


def waiting(numbers: Sequence[int], again: int = 40) -> None:
    """Print what one wait for a shard costs while so many are in flight: two for every worker."""
    idle, quick = Sleeper.remote(), Sleeper.remote()
    others = [idle.nap.remote() for _ in range(max(numbers))]
    ray.get(quick.answer.remote())
    print("| shards in flight | driver CPU of a wait, ms |\n|---|---|")
    for number in numbers:
        cpu = 0.0
        for _ in range(again):
            landed = quick.answer.remote()
            time.sleep(0.02)
            started = time.process_time()
            ray.wait([*others[: number - 1], landed], num_returns=1, timeout=1.0)
            cpu += time.process_time() - started
        print(f"| {number:,} | {1e3 * cpu / again:.2f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--in-flight", type=int, nargs="*", help="instead: the cost of waiting while so many shards are out"
    )
    options = parser.parse_args()
    if options.in_flight:
        with Cluster(ClusterSettings(address=None, inline_below=0), debug=False) as cluster:
            cluster.start()
            waiting(options.in_flight)
        return
    print("| shards | seconds to the first | driver CPU, ms a shard | driver memory, KB a shard | ms a shard by the clock "
          "| resume: seconds | of CPU | memory with all footers, KB a shard |\n|---|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    with Cluster(ClusterSettings(address=None, inline_below=0), debug=False) as cluster:
        cluster.start()
        for shards in options.shards:
            with tempfile.TemporaryDirectory() as place:
                measure(shards, cluster, options.workers, place)


if __name__ == "__main__":
    main()

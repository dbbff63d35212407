"""Six shards on a cluster of which nodes go away:  python -m tests.faults.lose_nodes"""

import sys
import threading
import time

import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from alphatoken.pipeline.cluster.pool import WorkerPool
from alphatoken.pipeline.cluster.work import Resources, Shard
from alphatoken.pipeline.run.progress import Progress


class Sleeper:
    def __call__(self, payload, advance):
        for _ in range(8):
            time.sleep(0.25)
            advance(1)
        return ray.get_runtime_context().get_node_id()


if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    done: list[str] = []

    def take_away() -> None:
        while not done:  # while its worker is in the middle of a shard
            time.sleep(0.1)
        time.sleep(0.5)
        cluster.remove_node(next(n for n in nodes if n.node_id == done[0]), allow_graceful=False)

    thread = threading.Thread(target=take_away)
    thread.start()
    with (
        Progress(Console(file=sys.stderr)) as progress,
        WorkerPool(Sleeper, {}, Resources(1, 1, 0.0), 120.0, False) as pool,
        progress.task("shards", 6, "shards") as task,
    ):
        pool.run([Shard(f"shard {n}", 8) for n in range(6)], lambda s: 1, lambda s, r: done.append(r), task)
    thread.join()
    print(f"{len(done)} of 6 shards")
    ray.shutdown()
    cluster.shutdown()

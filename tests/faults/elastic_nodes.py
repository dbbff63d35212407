"""The stage `value` on nodes that join and leave, each with a device that is none:  python -m tests.faults.elastic_nodes RUN OVERRIDE...

One node when it begins, four once a few shards are done. Then one is given notice (SIGTERM to its worker) and goes when
that has ended; one goes without notice; and one more joins.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from alphatoken.jobs.cli import main
from alphatoken.pipeline.value import stage
from alphatoken.pipeline.value.worker import ValueWorker

NODE = {"num_cpus": 1, "num_gpus": 1}


class Slow(ValueWorker):
    """Time for nodes to come and go."""

    def __call__(self, task, advance):
        time.sleep(1.5)
        return super().__call__(task, advance)


def at_work(run: Path) -> dict[int, int]:
    """Process of a worker -> shards that it has done."""
    logs = {int(log.stem.rpartition("-")[2]): log.read_text().count("done in") for log in run.glob("logs/value-*.log")}
    return {process: done for process, done in logs.items() if done}


def wait_for(what) -> None:
    ends = time.monotonic() + 240
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.05)


def come_and_go(cluster: Cluster, first, run: Path, story: dict) -> None:
    wait_for(lambda: len(list(run.glob("values/part-*"))) >= 2)
    nodes = [first, *(cluster.add_node(**NODE) for _ in range(3))]
    wait_for(lambda: len(at_work(run)) == 4)
    story["workers"] = 4
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes}
    node_of = {process: raylets[psutil.Process(process).ppid()] for process in at_work(run)}
    told, taken = list(node_of)[:2]
    before = at_work(run)[told]
    os.kill(told, signal.SIGTERM)
    wait_for(lambda: not psutil.pid_exists(told))
    story["finished after notice"] = at_work(run)[told] - before
    cluster.remove_node(node_of[told])
    cluster.remove_node(node_of[taken], allow_graceful=False)
    cluster.add_node(**NODE)
    story["left to do"] = story["shards"] - len(list(run.glob("values/part-*")))


if __name__ == "__main__":
    run = Path(sys.argv[1])
    # Without Ray's own hooks at the end of a process, which can be set by the main thread alone.
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args=head)
    first = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    stage.ValueWorker = Slow
    story: dict = {"shards": len(list(run.glob("prepared/part-*")))}
    thread = threading.Thread(target=come_and_go, args=(cluster, first, run, story))
    thread.start()
    workers = ["cluster.workers={min: 1, max: 64}", "cluster.gpus_per_worker=1", f"cluster.address={cluster.address}"]
    status = main(["value", f"run.dir={run}", *workers, *sys.argv[2:]])
    thread.join()
    story["worked"] = len(at_work(run))
    print(json.dumps(story))
    ray.shutdown()
    cluster.shutdown()
    sys.exit(status)

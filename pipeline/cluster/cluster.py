"""The Ray of a run: a cluster that is there already, or a local one; and what its workers may take of it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from alphatoken.pipeline.cluster.auth import about_token, token_hint
from alphatoken.pipeline.cluster.host import kill
from alphatoken.pipeline.cluster.pool import WorkerPool
from alphatoken.pipeline.cluster.work import MOST_THREADS, Resources, Worker, cpus_here, gpus_said
from alphatoken.pipeline.run.failure import RunFailed, first_line
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.settings import ClusterSettings

KNOCK_SECONDS = 20.0


class Cluster:
    """The Ray cluster of a run: joined at ``cluster.address``, or a local one that ends with the ``with`` block.

    Ray starts when resources are first asked for, so that a wrong setting or a finished stage costs no start. A
    cluster that was running before is left running.
    """

    def __init__(self, settings: ClusterSettings, debug: bool, progress: Progress | None = None) -> None:
        self.settings, self.debug, self.progress = settings, debug, progress
        self.started = False
        self.idle: list[Any] = []  # hosts without a worker
        self.idle_cpus = 0  # of each of them

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_idle()
        if self.started:
            ray.shutdown()

    def pool(self, make: Callable[..., Worker], arguments: dict[str, Any], resources: Resources) -> WorkerPool:
        """A pool of workers made by ``make(**arguments)``, on hosts that the one before has left, where they fit.

        That one has to have ended. Hosts that do not fit end here, since they hold CPUs; those with a GPU are not kept,
        since nothing but the end of a process gives all of a GPU's memory back.
        """
        if resources.gpus or resources.cpus != self.idle_cpus:
            self.end_idle()
        self.idle_cpus = resources.cpus
        idle = None if resources.gpus else self.idle
        return WorkerPool(make, arguments, resources, self.settings.shard_timeout, self.debug, idle)

    def end_idle(self) -> None:
        """End the hosts that no pool uses: others may be waiting for their CPUs."""
        while self.idle:
            kill(self.idle.pop())

    def start(self) -> None:
        """Start or join Ray, unless this process has already."""
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = self.settings.address
        try:
            if address is None:
                self._start_here()
            else:
                self._say(f"joining the Ray cluster at {address}")
                _knock(address)
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RayError, ValueError, RuntimeError) as error:
            raise RunFailed(_no_ray(address, error)) from error
        self.started = True

    def _start_here(self) -> None:
        """Start a local Ray; once more where it took longer than Ray itself waits for it."""
        for last in (False, True):
            self._say("starting a local Ray, which takes some seconds (without it: cluster.address=inline)")
            try:
                with _loopback_only():
                    ray.init(
                        address="local", num_cpus=_local_cpus(self.settings), include_dashboard=False,
                        log_to_driver=False, logging_level=logging.ERROR, _node_ip_address="127.0.0.1",
                    )  # fmt: skip
                return
            except Exception as error:  # of a start that takes too long Ray raises a plain Exception
                ray.shutdown()
                if last or not _takes_too_long(error):
                    raise RunFailed(_no_ray(None, error)) from error
                self._say(f"Ray did not start in time ({first_line(error)}): once more")

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)

    def model_resources(self) -> Resources:
        """Workers that hold a model: one per GPU where there are any, else one with all CPUs of a node, at most 8."""
        self.start()
        settings, total = self.settings, ray.cluster_resources()
        gpus = settings.gpus_per_worker
        if isinstance(gpus, str):
            gpus = 1.0 if total.get("GPU", 0) >= 1 else 0.0
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if settings.least_workers is None:
            check_gpus(gpus, [node.get("GPU", 0) for node in nodes])
        node = int(max(node.get("CPU", 1) for node in nodes))
        cpus = settings.cpus_per_worker
        if isinstance(cpus, str):
            per_node = settings.workers if isinstance(settings.workers, int) else 1
            cpus = 1 if gpus else max(1, min(MOST_THREADS, node // per_node))
        if cpus > node:
            raise RunFailed(f"cluster.cpus_per_worker={cpus}: no node of the cluster has more than {node} CPUs")
        most = sum(int(node.get("GPU", 0) // gpus) for node in nodes) if gpus else int(total.get("CPU", 1) // cpus)
        return self._as_many(most, cpus, gpus)

    def tokenizer_resources(self) -> Resources:
        """Workers that hold a tokenizer: one CPU each."""
        self.start()
        return self._as_many(int(ray.cluster_resources().get("CPU", 1)), 1, 0.0)

    def _as_many(self, most: int, cpus: int, gpus: float) -> Resources:
        """As many workers as are asked for; the cluster has room for ``most`` now. Says where it has not enough of it."""
        asked, least = self.settings.most_workers, self.settings.least_workers
        found = Resources(asked or max(1, most), cpus, gpus, least)
        room = (
            f"cluster.workers={self.settings.workers}: the cluster has room for {most} worker(s) of {found.each} each"
        )
        if least is not None:
            if most < least:
                self._once(f"{room}: waits up to cluster.shard_timeout for more; add nodes, or set a smaller min")
            return found
        if found.workers > most:
            self._once(
                f"{room} and goes on with those; with cluster.workers={{min: 1, max: {asked}}} more join as nodes do"
            )
        return replace(found, workers=min(found.workers, max(1, most)))

    def _once(self, text: str) -> None:
        if self.progress is not None:
            self.progress.once(text)


def check_gpus(asked: float, of_nodes: Sequence[float]) -> None:
    """Raise RunFailed where no node has as many GPUs as one worker takes."""
    most, total = max(of_nodes, default=0), sum(of_nodes)
    if asked <= most:
        return
    if not total:
        remedy = (
            f"has {gpus_said(total)}: start it with them (ray start --num-gpus=N), or leave cluster.gpus_per_worker out"
        )
    else:
        held = f"has {gpus_said(total)}" + (f", at most {most:g} on one node" if len(of_nodes) > 1 else "")
        remedy = (
            f"{held}, and a worker lies on one node: set it to {most:g} at most, and for a model that is too large "
            "model.lower_dtype=int8 or int4, or model.offload=cpu"
        )
    raise RunFailed(f"cluster.gpus_per_worker={asked:g}: the cluster {remedy}")


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at ``host:port``: Ray itself knocks there for a quarter of an hour."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()


def _takes_too_long(error: Exception) -> bool:
    return isinstance(error, TimeoutError) or "timed out" in str(error).lower()


def _no_ray(address: str | None, error: Exception) -> str:
    """Why there is no Ray, and what to do."""
    if address is not None:
        if missing := about_token(str(error)):
            return f"cluster.address={address}: the cluster {missing}"
        return (
            f"cluster.address={address}: Ray cannot be reached: {first_line(error)}; is it running there{token_hint()}?"
        )
    return (
        f"a local Ray cannot be started: {first_line(error)}; is the machine busy, or full (memory, /dev/shm, /tmp)? "
        "cluster.address=inline runs without Ray, with one worker"
    )


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Let a local Ray listen on the loopback interface alone.

    Ray replaces 127.0.0.1 by the machine's outer address where clusters are enabled, and has no option against that.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _local_cpus(settings: ClusterSettings) -> int:
    """The machine's CPUs, or as many as the user explicitly asked the workers to take together."""
    asked = 0
    if isinstance(settings.workers, int) and isinstance(settings.cpus_per_worker, int):
        asked = settings.workers * settings.cpus_per_worker
    return max(cpus_here(), asked)

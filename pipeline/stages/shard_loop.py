"""The shard loop: explicit shards on Ray actors that hold their model once. The only file that talks to Ray.

A shard is the unit of work, of retry and of resume. A future that dies with its actor puts its shard back into the
queue and a new actor in its place; a shard that has lost its worker three times is set aside and named at the end,
when all others are finished.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from pipeline.settings import ClusterSettings
from pipeline.stages.failure import RunFailed
from pipeline.stages.progress import Task

ATTEMPTS = 3
POLL_SECONDS = 1.0
SHARDS_IN_FLIGHT = 2  # per worker: one computes while the other is read or written

# A worker is called with (payload, advance); it calls advance(units) as it goes and returns a picklable result.
Worker = Callable[[Any, Callable[[int], None]], Any]


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of work: its name in messages, and its size in units of progress."""

    name: str
    units: int


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker takes, and how many workers there are."""

    workers: int
    cpus: int
    gpus: float


class Cluster:
    """The Ray cluster of a run: joined at ``cluster.address``, or a local one that ends with the ``with`` block.

    Ray starts when resources are first asked for, so that a wrong setting or a finished stage costs no start. A
    cluster that was running before is left running.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self.started = False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self.started:
            ray.shutdown()

    def start(self) -> None:
        """Start or join Ray, unless this process has already."""
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = self.settings.address
        try:
            if address is None:
                ray.init(
                    address="local", num_cpus=_local_cpus(self.settings), include_dashboard=False, log_to_driver=False,
                    logging_level=logging.ERROR, _node_ip_address="127.0.0.1",
                )  # fmt: skip
            else:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RayError, ValueError, RuntimeError) as error:
            raise RunFailed(
                f"cluster.address={address}: Ray cannot be reached or started: {_first_line(error)}"
            ) from error
        self.started = True

    def model_resources(self) -> Resources:
        """Workers that hold a model: one per GPU where there are any, else one with all CPUs of a node, at most 8."""
        self.start()
        settings, total = self.settings, ray.cluster_resources()
        gpus = settings.gpus_per_worker
        if isinstance(gpus, str):
            gpus = 1.0 if total.get("GPU", 0) >= 1 else 0.0
        if gpus > total.get("GPU", 0):
            raise RunFailed(f"cluster.gpus_per_worker={gpus}: the cluster has {total.get('GPU', 0):g} GPUs")
        node = int(max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]))
        cpus = settings.cpus_per_worker
        if isinstance(cpus, str):
            per_node = settings.workers if isinstance(settings.workers, int) else 1
            cpus = 1 if gpus else max(1, min(8, node // per_node))
        if cpus > node:
            raise RunFailed(f"cluster.cpus_per_worker={cpus}: no node of the cluster has more than {node} CPUs")
        most = max(1, int(total.get("GPU", 0) // gpus) if gpus else int(total.get("CPU", 1) // cpus))
        workers = settings.workers if isinstance(settings.workers, int) else most
        return Resources(min(workers, most), cpus, gpus)

    def tokenizer_resources(self) -> Resources:
        """Workers that hold a tokenizer: one CPU each."""
        self.start()
        most = max(1, int(ray.cluster_resources().get("CPU", 1)))
        workers = self.settings.workers if isinstance(self.settings.workers, int) else most
        return Resources(min(workers, most), 1, 0.0)


def _local_cpus(settings: ClusterSettings) -> int:
    """The machine's CPUs, or as many as the user explicitly asked the workers to take together."""
    asked = 0
    if isinstance(settings.workers, int) and isinstance(settings.cpus_per_worker, int):
        asked = settings.workers * settings.cpus_per_worker
    return max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, asked)


@ray.remote
class _Host:
    """The actor: makes a worker once, runs shards on it, and tells how far each one is."""

    def __init__(self, make: Callable[..., Worker], arguments: dict[str, Any]) -> None:
        self.make, self.arguments = make, arguments
        self.worker: Worker | None = None
        self.units: dict[str, int] = {}
        self.lock = threading.Lock()

    def start(self) -> tuple[str, Any]:
        """Make the worker; errors come back as values, so that they are told apart from a lost actor."""
        return _caught(lambda: setattr(self, "worker", self.make(**self.arguments)))

    def run(self, name: str, payload: Any) -> tuple[str, Any]:
        """Run one shard."""
        with self.lock:
            self.units[name] = 0

        def advance(units: int) -> None:
            with self.lock:
                self.units[name] += units

        try:
            assert self.worker is not None
            worker = self.worker
            return _caught(lambda: worker(payload, advance))
        finally:
            with self.lock:
                del self.units[name]

    def progress(self) -> dict[str, int]:
        """Units done of the shards in work."""
        with self.lock:
            return dict(self.units)


def _caught(work: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "ok", work()
    except Exception as error:
        return "error", (f"{type(error).__name__}: {error}", traceback.format_exc(), isinstance(error, RunFailed))


class WorkerPool:
    """Actors that each hold one worker made by ``make(**arguments)``; they end with the ``with`` block."""

    def __init__(
        self, make: Callable[..., Worker], arguments: dict[str, Any], resources: Resources, timeout: float, debug: bool
    ) -> None:
        self.make, self.arguments, self.resources = make, arguments, resources
        self.timeout, self.debug = timeout, debug
        self.hosts: list[Any] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            ray.kill(host)
        self.hosts = []

    def run(
        self, shards: Sequence[Shard], payload: Callable[[Shard], Any], done: Callable[[Shard, Any], None], task: Task
    ) -> None:
        """Run every shard once, in any order; ``done(shard, result)`` is called in the driver for each.

        ``payload(shard)`` is made when the shard is handed out, so that at most two per worker are in memory. Raises
        RunFailed at once when a worker reports an error, and at the end when shards had to be set aside.
        """
        _Loop(self, shards, payload, done, task).run()

    def spawn(self) -> Any:
        """Start one more actor."""
        threads = str(self.resources.cpus)
        environment = {
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
        }  # fmt: skip
        host = _Host.options(  # type: ignore[attr-defined]
            num_cpus=self.resources.cpus, num_gpus=self.resources.gpus, max_concurrency=SHARDS_IN_FLIGHT + 1,
            max_restarts=0, runtime_env={"env_vars": environment},
        ).remote(self.make, self.arguments)  # fmt: skip
        self.hosts.append(host)
        return host


class _Loop:
    """The state of one call of WorkerPool.run."""

    def __init__(self, pool: WorkerPool, shards: Sequence[Shard], payload: Any, done: Any, task: Task) -> None:
        self.pool, self.payload, self.done, self.task = pool, payload, done, task
        self.queue = deque(shards)
        self.attempts: dict[str, int] = {}
        self.set_aside: list[str] = []
        self.flights: dict[Any, tuple[Any, Shard]] = {}  # future -> (host, shard)
        self.starting: dict[Any, Any] = {}  # future -> host
        self.seen: dict[Any, dict[str, int]] = {}  # host -> units of the shards in work
        self.alive_at: dict[Any, float] = {}  # host -> when it last made progress
        self.failed_starts = 0
        self.finished_units = 0
        self.polled = 0.0

    def run(self) -> None:
        wanted = min(self.pool.resources.workers, len(self.queue))
        ready = list(self.pool.hosts)
        for host in ready:
            self._feed(host)
        for _ in range(wanted - len(ready)):
            self._start()
        while self.queue or self.flights:
            pending = [*self.flights, *self.starting]
            for future in ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)[0]:
                if future in self.starting:
                    self._started(future)
                else:
                    self._landed(future)
            self._poll()
        self.task.at(self.finished_units)
        if self.set_aside:
            raise RunFailed(
                f"{len(self.set_aside)} shard(s) lost their worker {ATTEMPTS} times and were set aside, all others are "
                f"finished: {', '.join(self.set_aside)}; look for out-of-memory kills, then run the same command again"
            )

    def _start(self) -> None:
        host = self.pool.spawn()
        self.alive_at[host] = time.monotonic()
        self.starting[host.start.remote()] = host

    def _started(self, future: Any) -> None:
        host = self.starting.pop(future)
        try:
            status, result = ray.get(future)
        except RayError as error:
            self.failed_starts += 1
            if self.failed_starts >= ATTEMPTS:
                raise RunFailed(
                    f"workers die while they start: {_first_line(error)}; is there enough memory?"
                ) from error
            self._retire(host)
            self._start()
            return
        if status == "error":
            raise RunFailed(self._explain("a worker cannot start", result))
        self.alive_at[host] = time.monotonic()
        self._feed(host)

    def _feed(self, host: Any) -> None:
        """Hand out shards; one that has lost a worker before runs alone, so that no other is blamed for it."""
        flying = [shard for other, shard in self.flights.values() if other is host]
        while self.queue and len(flying) < SHARDS_IN_FLIGHT:
            if flying and any(shard.name in self.attempts for shard in (*flying, self.queue[0])):
                return
            shard = self.queue.popleft()
            self.flights[host.run.remote(shard.name, self.payload(shard))] = (host, shard)
            self.alive_at[host] = time.monotonic()
            flying.append(shard)

    def _landed(self, future: Any) -> None:
        host, shard = self.flights.pop(future)
        try:
            status, result = ray.get(future)
        except RayActorError:
            self._requeue(shard)
            self._replace(host)
            return
        if status == "error":
            raise RunFailed(self._explain(shard.name, result))
        self.finished_units += shard.units
        self.alive_at[host] = time.monotonic()
        self.done(shard, result)
        self._feed(host)

    def _requeue(self, shard: Shard) -> None:
        self.attempts[shard.name] = self.attempts.get(shard.name, 0) + 1
        if self.attempts[shard.name] >= ATTEMPTS:
            self.set_aside.append(shard.name)
        else:
            self.queue.append(shard)
        self.task.progress.say(f"{shard.name}: its worker was lost (attempt {self.attempts[shard.name]} of {ATTEMPTS})")

    def _replace(self, host: Any) -> None:
        for future, (other, shard) in list(self.flights.items()):
            if other is host:
                del self.flights[future]
                self._requeue(shard)
        self._retire(host)
        if self.queue and not self.starting:
            self._start()

    def _retire(self, host: Any) -> None:
        if host in self.pool.hosts:
            self.pool.hosts.remove(host)
        self.seen.pop(host, None)
        self.alive_at.pop(host, None)
        ray.kill(host)

    def _poll(self) -> None:
        now = time.monotonic()
        if now - self.polled < POLL_SECONDS:
            return
        self.polled = now
        busy = {host for host, _ in self.flights.values()}
        asked = {host.progress.remote(): host for host in busy}
        answered = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_SECONDS)[0] if asked else []
        for future in answered:
            try:
                units = ray.get(future)
            except RayError:
                continue  # its shards' futures will say so
            host = asked[future]
            if units != self.seen.get(host):
                self.alive_at[host] = now
            self.seen[host] = units
        for host in [*busy, *self.starting.values()]:
            if now - self.alive_at.get(host, now) > self.pool.timeout:
                self._hung(host)
        running = sum(sum(units.values()) for host, units in self.seen.items() if host in busy)
        self.task.at(self.finished_units + running)

    def _hung(self, host: Any) -> None:
        self.task.progress.say(f"a worker made no progress for cluster.shard_timeout={self.pool.timeout:g} s: replaced")
        for future, other in list(self.starting.items()):
            if other is host:
                del self.starting[future]
                self.failed_starts += 1
                if self.failed_starts >= ATTEMPTS:
                    raise RunFailed(
                        f"no worker could be started within cluster.shard_timeout={self.pool.timeout:g} s: the cluster "
                        f"must have {self.pool.resources.cpus} CPUs and {self.pool.resources.gpus:g} GPUs free"
                    )
                self._retire(host)
                self._start()
                return
        self._replace(host)

    def _explain(self, where: str, error: tuple[str, str, bool]) -> str:
        message, trace, expected = error
        if expected:
            message = message.partition(": ")[2]
        return f"{where}: {message}" + (f"\n{trace}" if self.pool.debug else "")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""The shard loop: explicit shards on Ray actors that hold their model once. The only file that talks to Ray.

A shard is the unit of work, of retry and of resume. A future that dies with its actor puts its shard back into the
queue and a new actor in its place; so does a worker that hangs or reports that a disk, a store or the memory refused.
A shard that failed three times is set aside and named with its reason at the end, when all others are finished. A
node that goes away is not held against the shards on it. A process without a GPU that has served one pool serves the next
with as many CPUs per worker, since importing torch and transformers takes seconds.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, NodeDiedError, RayActorError, RayError

from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.progress import Task
from alphatoken.pipeline.settings import ClusterSettings

ATTEMPTS = 3
LOST_NODES = 20  # a shard may lose as many nodes under it, as on machines that are taken away
SET_ASIDE_IN_A_ROW = 3  # with no success between them it is not the shards: a disk is full, a store is gone
RETRY_SECONDS = 2.0  # before a shard is tried again; doubled each time
POLL_SECONDS = 1.0
DOUBT_SECONDS = 60.0  # for Ray to find out that a node has died
RELEASE_SECONDS = 30.0  # for a process to let go of its worker
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

    def __init__(self, settings: ClusterSettings, debug: bool) -> None:
        self.settings, self.debug = settings, debug
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
            _kill(self.idle.pop())

    def start(self) -> None:
        """Start or join Ray, unless this process has already."""
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = self.settings.address
        try:
            if address is None:
                with _loopback_only():
                    ray.init(
                        address="local", num_cpus=_local_cpus(self.settings), include_dashboard=False,
                        log_to_driver=False, logging_level=logging.ERROR, _node_ip_address="127.0.0.1",
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
    return max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, asked)


@ray.remote
class _Host:
    """The actor: holds one worker at a time, runs shards on it, and tells how far each one is."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.units: dict[str, int] = {}
        self.lock = threading.Lock()

    def start(self, make: Callable[..., Worker], arguments: dict[str, Any]) -> tuple[str, Any]:
        """Make a worker; errors come back as values, so that they are told apart from a lost actor."""

        def start() -> str:
            self.worker = make(**arguments)
            return ray.get_runtime_context().get_node_id()

        return _caught(start)

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

    def release(self) -> None:
        """Let go of the worker and of the memory that it holds."""
        self.worker = None
        gc.collect()

    def progress(self) -> dict[str, int]:
        """Units done of the shards in work."""
        with self.lock:
            return dict(self.units)


def _caught(work: Callable[[], Any]) -> tuple[str, Any]:
    """("ok", result), ("error", ...) for what will be the same next time, or ("retry", ...) for what may pass."""
    try:
        return "ok", work()
    except Exception as error:
        kind = "retry" if isinstance(error, OSError | MemoryError) or _NO_MEMORY in str(error) else "error"
        return kind, (f"{type(error).__name__}: {error}", traceback.format_exc(), isinstance(error, RunFailed))


_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"


class WorkerPool:
    """Hosts that each hold one worker made by ``make(**arguments)``, until the end of the ``with`` block.

    ``idle``: hosts with as many CPUs to begin with, to which it leaves its own when it ends well; None: they end.
    """

    def __init__(
        self, make: Callable[..., Worker], arguments: dict[str, Any], resources: Resources, timeout: float, debug: bool,
        idle: list[Any] | None = None,
    ) -> None:  # fmt: skip
        self.make, self.arguments, self.resources = make, arguments, resources
        self.timeout, self.debug, self.idle = timeout, debug, idle
        self.reused: set[Any] = set()
        self.hosts: list[Any] = []
        self.nodes: dict[Any, str] = {}  # host that is ready -> its node
        self.starting: dict[Any, Any] = {}  # future -> host that is not ready yet

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: object = None, *_: object) -> None:
        keep = self.idle if kind is None else None
        released: set[Any] = set()
        try:
            if keep is not None:
                released = _released(self.nodes)
        finally:
            for host in self.hosts:
                if keep is not None and host in released:
                    keep.append(host)
                else:
                    _kill(host)
            self.hosts, self.nodes, self.starting = [], {}, {}

    def run(
        self, shards: Sequence[Shard], payload: Callable[[Shard], Any], done: Callable[[Shard, Any], None], task: Task
    ) -> None:
        """Run every shard once, in any order; ``done(shard, result)`` is called in the driver for each.

        ``payload(shard)`` is made when the shard is handed out, so that at most two per worker are in memory. Raises
        RunFailed at once when a worker reports an error that would come again, and at the end when shards had to be
        set aside, with the reasons.
        """
        _Loop(self, shards, payload, done, task).run()

    def spawn(self) -> Any:
        """One more host: an idle one or a new one."""
        if self.idle:
            host = self.idle.pop()
            self.reused.add(host)
            self.hosts.append(host)
            return host
        threads = str(self.resources.cpus)
        environment = {
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
        }  # fmt: skip
        host = _Host.options(  # type: ignore[attr-defined]  # ray.remote makes it; mypy sees the plain class
            num_cpus=self.resources.cpus, num_gpus=self.resources.gpus, max_concurrency=SHARDS_IN_FLIGHT + 1,
            max_restarts=0, runtime_env={"env_vars": environment},
        ).remote()  # fmt: skip
        self.hosts.append(host)
        return host


class Shared:
    """A value that goes to the cluster's object store once and is read there by the workers whose shards name it."""

    def __init__(self, value: Any) -> None:
        self.reference = ray.put(value)

    def get(self) -> Any:
        """The value; numpy arrays in it are read-only views of the store's memory."""
        return ray.get(self.reference)


@dataclass(slots=True)
class _Doubt:
    """Shards of a worker that does not answer, since when, and the question that Ray's verdict will answer."""

    shards: list[Shard]
    since: float
    asked: Any


class _Loop:
    """The state of one call of WorkerPool.run."""

    def __init__(self, pool: WorkerPool, shards: Sequence[Shard], payload: Any, done: Any, task: Task) -> None:
        self.pool, self.payload, self.done, self.task = pool, payload, done, task
        self.queue = deque(shards)
        self.attempts: dict[str, int] = {}
        self.lost_nodes: dict[str, int] = {}
        self.not_before: dict[str, float] = {}  # shard -> when it may be tried again
        self.set_aside: dict[str, str] = {}  # shard -> reason
        self.set_aside_in_a_row = 0
        self.flights: dict[Any, tuple[Any, Shard]] = {}  # future -> (host, shard)
        self.starting = pool.starting  # also what an earlier call has started and not waited for
        self.doubtful: dict[Any, _Doubt] = {}  # host that does not answer, and Ray does not know yet why
        self.node_of: dict[Any, str] = {}  # host that is ready -> its node
        self.asked: dict[Any, Any] = {}  # host -> the future of its progress
        self.seen: dict[Any, dict[str, int]] = {}  # host -> units of the shards in work
        # host -> when it last made progress
        self.alive_at: dict[Any, float] = dict.fromkeys(self.starting.values(), time.monotonic())
        self.failed_starts = 0
        self.finished_units = task.done  # a task may go over several calls
        self.polled = time.monotonic()

    def run(self) -> None:
        self.node_of = dict(self.pool.nodes)
        while self.queue or self.flights or self.doubtful:
            self._judge()
            self._assign()
            pending = [*self.flights, *self.starting]
            if not pending:
                time.sleep(POLL_SECONDS / 10)  # all that is left waits for its next attempt, or for Ray's verdict
                continue
            for future in ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)[0]:
                if future in self.starting:
                    self._started(future)
                elif future in self.flights:
                    self._landed(future)
            self._poll()
        self.pool.nodes = self.node_of
        self.task.at(self.finished_units)
        if self.set_aside:
            raise RunFailed(self._told("all others are finished"))

    def _told(self, others: str) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.set_aside.items())
        return (
            f"{len(self.set_aside)} shard(s) failed {ATTEMPTS} times and were set aside, {others}: {reasons}; remove the "
            "cause, then run the same command again"
        )

    def _assign(self) -> None:
        """Feed every worker that is ready, and start as many as there is work for."""
        for host in self.node_of:
            if host not in self.doubtful:
                self._feed(host)
        while self.queue and len(self.pool.hosts) < self.pool.resources.workers:
            if len(self.starting) >= len(self.queue):
                return
            self._start()

    def _start(self) -> None:
        host = self.pool.spawn()
        self.alive_at[host] = time.monotonic()
        self.starting[host.start.remote(self.pool.make, self.pool.arguments)] = host

    def _started(self, future: Any) -> None:
        host = self.starting.pop(future)
        try:
            status, result = ray.get(future)
        except RayError as error:
            if host in self.pool.reused:  # it has died since its last pool
                self._retire(host)
                return
            self._no_start(host, f"workers die while they start: {_first_line(error)}; is there enough memory?")
            return
        if status == "error":
            raise RunFailed(self._explain("a worker cannot start", result))
        if status == "retry":
            self._no_start(host, self._explain("a worker cannot start", result))
            return
        self.failed_starts = 0
        self.node_of[host] = result
        self.alive_at[host] = time.monotonic()

    def _no_start(self, host: Any, reason: str) -> None:
        self._retire(host)
        self.failed_starts += 1
        if self.failed_starts >= ATTEMPTS:
            raise RunFailed(reason)

    def _feed(self, host: Any) -> None:
        """Hand out shards; one that has failed before runs alone, so that no other is blamed for it."""
        flying = [shard for other, shard in self.flights.values() if other is host]
        while len(flying) < SHARDS_IN_FLIGHT and not any(shard.name in self.attempts for shard in flying):
            shard = self._next(alone=not flying)
            if shard is None:
                return
            self.flights[host.run.remote(shard.name, self.payload(shard))] = (host, shard)
            self.alive_at[host] = time.monotonic()
            flying.append(shard)

    def _next(self, alone: bool) -> Shard | None:
        """The first shard that may be tried now, or None: also where one that failed waits for a worker of its own."""
        now = time.monotonic()
        for shard in self.queue:
            if self.not_before.get(shard.name, 0.0) > now:
                continue
            if shard.name in self.attempts and not alone:
                return None
            self.queue.remove(shard)
            return shard
        return None

    def _landed(self, future: Any) -> None:
        host, shard = self.flights.pop(future)
        try:
            status, result = ray.get(future)
        except ActorUnavailableError:
            flying = [future for future, (other, _) in self.flights.items() if other is host]
            shards = [shard, *(self.flights.pop(future)[1] for future in flying)]
            self.doubtful[host] = _Doubt(shards, time.monotonic(), host.progress.remote())
            return
        except RayError as error:
            self._lost(host, [shard], f"its worker was lost ({_first_line(error)})", _took_node(error))
            return
        if status == "error":
            raise RunFailed(self._explain(shard.name, result))
        self.alive_at[host] = time.monotonic()
        if status == "retry":
            self._failed(shard, self._explain("", result).removeprefix(": "))
            return
        self.set_aside_in_a_row = 0
        self.finished_units += shard.units
        self.done(shard, result)

    def _judge(self) -> None:
        """Workers that did not answer: lost by themselves, or with their node, which Ray finds out after a while."""
        for host, doubt in list(self.doubtful.items()):
            reason, with_node = "its worker could not be reached any more", True
            if ray.wait([doubt.asked], timeout=0)[0]:
                try:
                    ray.get(doubt.asked)  # it is there again, but what it was told may be lost
                except ActorUnavailableError:
                    doubt.asked = host.progress.remote()
                    continue
                except RayError as error:
                    reason, with_node = f"its worker was lost ({_first_line(error)})", _took_node(error)
            elif time.monotonic() - doubt.since < DOUBT_SECONDS and self.node_of.get(host) not in _dead_nodes():
                continue
            del self.doubtful[host]
            self._lost(host, doubt.shards, reason, with_node)

    def _lost(self, host: Any, shards: Iterable[Shard], reason: str, with_node: bool) -> None:
        """A worker is gone: its shards go back into the queue."""
        with_node = with_node or self.node_of.get(host) in _dead_nodes()
        also = [future for future, (other, _) in self.flights.items() if other is host]
        for shard in [*shards, *(self.flights.pop(future)[1] for future in also)]:
            lost = self.lost_nodes.get(shard.name, 0) + 1
            if with_node and lost <= LOST_NODES:
                self.lost_nodes[shard.name] = lost
                self.queue.append(shard)
                self.task.progress.say(f"{shard.name}: its node went away, it is done again elsewhere")
            else:
                self._failed(shard, reason)
        self._retire(host)

    def _failed(self, shard: Shard, reason: str) -> None:
        """An attempt at a shard failed: later again, or set aside."""
        attempt = self.attempts[shard.name] = self.attempts.get(shard.name, 0) + 1
        self.task.progress.say(f"{shard.name}: {reason} (attempt {attempt} of {ATTEMPTS})")
        if attempt < ATTEMPTS:
            self.not_before[shard.name] = time.monotonic() + RETRY_SECONDS * 2 ** (attempt - 1)
            self.queue.appendleft(shard)  # soon, so that what every shard will meet is known before all have been tried
            return
        self.set_aside[shard.name] = reason
        self.set_aside_in_a_row += 1
        if self.set_aside_in_a_row >= SET_ASIDE_IN_A_ROW and len(self.queue) + len(self.flights) > 0:
            raise RunFailed(self._told("and no other was finished meanwhile, so that the rest was not tried"))

    def _retire(self, host: Any) -> None:
        if host in self.pool.hosts:
            self.pool.hosts.remove(host)
        for known in (self.seen, self.alive_at, self.node_of, self.asked):
            known.pop(host, None)  # type: ignore[attr-defined]  # dicts of different values, to mypy no dicts
        _kill(host)

    def _poll(self) -> None:
        now = time.monotonic()
        if now - self.polled < POLL_SECONDS:
            return
        self.polled = now
        busy = {host for host, _ in self.flights.values()}
        for host in busy - self.asked.keys():
            self.asked[host] = host.progress.remote()
        asked = {future: host for host, future in self.asked.items()}
        for future in ray.wait(list(asked), num_returns=len(asked), timeout=0.2)[0] if asked else ():
            host = asked[future]
            del self.asked[host]
            try:
                units = ray.get(future)
            except RayError:
                continue  # its shards' futures will say so
            if units != self.seen.get(host):
                self.alive_at[host] = now
            self.seen[host] = units
        if self.starting and not any(node["Alive"] for node in ray.nodes()):
            raise RunFailed("Ray has no node left that could start a worker; run the same command again, it goes on")
        for host in [*busy, *self.starting.values()]:
            if now - self.alive_at.get(host, now) > self.pool.timeout:
                self._hung(host)
        running = sum(sum(units.values()) for host, units in self.seen.items() if host in busy)
        self.task.at(self.finished_units + running)

    def _hung(self, host: Any) -> None:
        limit = f"cluster.shard_timeout={self.pool.timeout:g} s"
        for future, other in list(self.starting.items()):
            if other is host:
                del self.starting[future]
                self.task.progress.say(f"a worker did not start within {limit}")
                self._no_start(
                    host,
                    f"no worker could be started within {limit}: the cluster must have "
                    f"{self.pool.resources.cpus} CPUs and {self.pool.resources.gpus:g} GPUs free",
                )
                return
        self._lost(host, [], f"its worker made no progress for {limit}", False)

    def _explain(self, where: str, error: tuple[str, str, bool]) -> str:
        message, trace, expected = error
        if expected:
            message = message.partition(": ")[2]
        if any(f"[Errno {code}]" in message or f"[errno {code}]" in message for code in (errno.ENOSPC, errno.EDQUOT)):
            message += " (the disk is full)"
        return f"{where}: {message}" + (f"\n{trace}" if self.pool.debug else "")


def _kill(host: Any) -> None:
    if not ray.is_initialized():
        return  # gone with Ray, which `ray.kill` would start anew
    with suppress(RayError, ValueError):  # it may be gone already
        ray.kill(host)


def _released(hosts: Iterable[Any]) -> set[Any]:
    """The hosts that have let go of their worker in time."""
    asked = {host.release.remote(): host for host in hosts}
    answered = ray.wait(list(asked), num_returns=len(asked), timeout=RELEASE_SECONDS)[0] if asked else []
    found = set()
    for future in answered:
        with suppress(RayError):
            ray.get(future)
            found.add(asked[future])
    return found


def _took_node(error: RayError) -> bool:
    """Whether Ray says that a worker was lost because of its node."""
    return (
        isinstance(error, NodeDiedError)
        or (isinstance(error, RayActorError) and getattr(error, "preempted", False))
        or "node has died" in str(error)
        or "node was terminated" in str(error)
    )


def _dead_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

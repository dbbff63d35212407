"""The processes that workers live in: Ray actors that each hold one worker at a time.

A process without a GPU that has served one pool serves the next with as many CPUs per worker, since importing torch and
transformers takes seconds.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from alphatoken.pipeline.cluster.work import Resources, Worker, caught

RELEASE_SECONDS = 30.0  # for a process to let go of its worker
SHARDS_IN_FLIGHT = 2  # per worker: one computes while the other is read or written
LEAVING = "leaving"  # a shard is handed back, since notice was given


@ray.remote
class Host:
    """The actor: holds one worker at a time, runs shards on it, and tells how far each one is.

    SIGTERM is the notice that its machine will be taken away: what is in work is finished, what comes later is handed back.
    """

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.units: dict[str, int] = {}
        self.lock = threading.Lock()
        self.leaving = self.idle = False
        # The main thread of a Ray worker waits outside of Python, which would run a handler about a second later.
        told, tells = os.pipe()
        os.set_blocking(tells, False)
        signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        threading.Thread(target=self._heed, args=(told,), daemon=True).start()

    def _heed(self, told: int) -> None:
        while signal.SIGTERM not in os.read(told, 64):
            pass
        self.leaving = True
        if self.idle:
            os._exit(0)

    def start(self, make: Callable[..., Worker], arguments: dict[str, Any]) -> tuple[str, Any]:
        """Make a worker; errors come back as values, so that they are told apart from a lost actor."""
        self.idle = False
        if self.leaving:
            return LEAVING, None

        def start() -> str:
            self.worker = make(**arguments)
            return ray.get_runtime_context().get_node_id()

        return caught(start)

    def run(self, name: str, payload: Any) -> tuple[str, Any]:
        """Run one shard."""
        if self.leaving:
            return LEAVING, None
        with self.lock:
            self.units[name] = 0

        def advance(units: int) -> None:
            with self.lock:
                self.units[name] += units

        try:
            assert self.worker is not None
            worker = self.worker
            return caught(lambda: worker(payload, advance))
        finally:
            with self.lock:
                del self.units[name]

    def release(self) -> None:
        """Let go of the worker and of the memory that it holds."""
        self.worker = None
        self.idle = True
        gc.collect()

    def progress(self) -> tuple[dict[str, int], bool]:
        """Units done of the shards in work, and whether notice was given."""
        with self.lock:
            return dict(self.units), self.leaving


class Hosts:
    """The processes of one pool, each with one worker made by ``make(**arguments)``.

    ``idle``: processes with as many CPUs to begin with, to which they are left at a good end; None: they end.
    """

    def __init__(
        self, make: Callable[..., Worker], arguments: dict[str, Any], resources: Resources, idle: list[Any] | None
    ) -> None:
        self.make, self.arguments, self.resources, self.idle = make, arguments, resources, idle
        self.reused: set[Any] = set()
        self.all: list[Any] = []
        self.nodes: dict[Any, str] = {}  # host that is ready -> its node
        self.starting: dict[Any, Any] = {}  # future -> host that is not ready yet

    def spawn(self) -> Any:
        """One more process without a worker: an idle one or a new one."""
        if self.idle:
            host = self.idle.pop()
            self.reused.add(host)
            self.all.append(host)
            return host
        threads = str(self.resources.cpus)
        environment = {
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
        }  # fmt: skip
        host = Host.options(  # type: ignore[attr-defined]  # ray.remote makes it; mypy sees the plain class
            num_cpus=self.resources.cpus, num_gpus=self.resources.gpus, max_concurrency=SHARDS_IN_FLIGHT + 1,
            max_restarts=0, runtime_env={"env_vars": environment},
        ).remote()  # fmt: skip
        self.all.append(host)
        return host

    def start(self) -> Any:
        """One more process whose worker is being made: it is in ``starting`` from now on."""
        host = self.spawn()
        self.starting[host.start.remote(self.make, self.arguments)] = host
        return host

    def end(self, host: Any) -> None:
        """End one process."""
        if host in self.all:
            self.all.remove(host)
        kill(host)

    def close(self, keep: bool) -> None:
        """End all, or with ``keep`` leave those to ``idle`` that have let go of their worker in time."""
        idle = self.idle if keep else None
        released: set[Any] = set()
        try:
            if idle is not None:
                released = _released(self.nodes)
        finally:
            for host in self.all:
                if idle is not None and host in released:
                    idle.append(host)
                else:
                    kill(host)
            self.all, self.nodes, self.starting = [], {}, {}


def kill(host: Any) -> None:
    """End a process."""
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

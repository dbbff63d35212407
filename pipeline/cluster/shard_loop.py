"""The shard loop: what happens between a list of shards and the workers that do them.

A shard is the unit of work, of retry and of resume. A future that dies with its actor puts its shard back into the
queue and a new actor in its place; so does a worker that hangs or reports that a disk, a store or the memory refused.
A shard that failed three times is set aside and named with its reason at the end, when all others are finished. A
node that goes away is not held against the shards on it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, NodeDiedError, RayActorError, RayError

from alphatoken.pipeline.cluster.host import LEAVING, SHARDS_IN_FLIGHT, Hosts
from alphatoken.pipeline.cluster.work import (
    ATTEMPTS,
    RETRY_SECONDS,
    SET_ASIDE_IN_A_ROW,
    THE_REST_IS_DONE,
    THE_REST_WAS_LEFT,
    Shard,
    Work,
    explained,
    told_set_aside,
)
from alphatoken.pipeline.run.failure import RunFailed, first_line

LOST_NODES = 20  # a shard may lose as many nodes under it, as on machines that are taken away
POLL_SECONDS = 1.0
DOUBT_SECONDS = 60.0  # for Ray to find out that a node has died


@dataclass(slots=True)
class _Doubt:
    """Shards of a worker that does not answer, since when, and the question that Ray's verdict will answer."""

    shards: list[Shard]
    since: float
    asked: Any


class ShardLoop:
    """One call of WorkerPool.run, with what it knows of its shards and of the workers.

    ``timeout``: seconds without progress after which a worker is taken for hung. ``debug``: tracebacks in messages.
    """

    def __init__(self, hosts: Hosts, work: Work, timeout: float, debug: bool) -> None:
        self.hosts, self.work, self.timeout, self.debug = hosts, work, timeout, debug
        self.task = work.task
        self.queue = deque(work.shards)
        self.attempts: dict[str, int] = {}
        self.lost_nodes: dict[str, int] = {}
        self.not_before: dict[str, float] = {}  # shard -> when it may be tried again
        self.set_aside: dict[str, str] = {}  # shard -> reason
        self.set_aside_in_a_row = 0
        self.flights: dict[Any, tuple[Any, Shard]] = {}  # future -> (host, shard)
        self.starting = hosts.starting  # also what an earlier call has started and not waited for
        self.doubtful: dict[Any, _Doubt] = {}  # host that does not answer, and Ray does not know yet why
        self.node_of: dict[Any, str] = {}  # host that is ready -> its node
        self.asked: dict[Any, Any] = {}  # host -> the future of its progress
        self.seen: dict[Any, dict[str, int]] = {}  # host -> units of the shards in work
        # host -> when it last made progress
        self.alive_at: dict[Any, float] = dict.fromkeys(self.starting.values(), time.monotonic())
        self.failed_starts = 0
        self.leaving: set[Any] = set()  # hosts whose machines will be taken away: they get no more shards
        self.finished_units = self.task.done  # a task may go over several calls
        self.polled = time.monotonic()

    def run(self) -> None:
        """Until every shard is finished or set aside. Raises RunFailed."""
        self.node_of = dict(self.hosts.nodes)
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
        self.hosts.nodes = self.node_of
        self.task.at(self.finished_units)
        if self.set_aside:
            raise RunFailed(told_set_aside(self.set_aside, THE_REST_IS_DONE))

    def _assign(self) -> None:
        """Feed every worker that is ready, and start as many as there is work for."""
        flying: dict[Any, list[Shard]] = {host: [] for host in self.node_of}
        for host, shard in self.flights.values():
            flying.setdefault(host, []).append(shard)
        fit = [host for host in self.node_of if host not in self.doubtful and host not in self.leaving]
        for at_once in range(1, SHARDS_IN_FLIGHT + 1):  # one to each before anybody has a second
            for host in fit:
                if len(flying[host]) < at_once:
                    self._feed(host, flying[host])
        for host in [one for one in self.leaving if not flying.get(one) and one not in self.doubtful]:
            self._retire(host)  # it has finished what it had
        while self.queue and len(self.hosts.all) < self.hosts.resources.workers:
            if len(self.starting) >= len(self.queue):
                return
            self._start()

    def _start(self) -> None:
        self.alive_at[self.hosts.start()] = time.monotonic()

    def _started(self, future: Any) -> None:
        host = self.starting.pop(future)
        try:
            status, result = ray.get(future)
        except RayError as error:
            if host in self.hosts.reused:  # it has died since its last pool
                self._retire(host)
                return
            if self.hosts.resources.least is not None and _took_node(error):
                self._retire(host)  # where nodes come and go that is no fault of the worker
                return
            self._no_start(host, f"workers die while they start: {first_line(error)}; is there enough memory?")
            return
        if status == LEAVING:
            self._retire(host)
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

    def _feed(self, host: Any, flying: list[Shard]) -> None:
        """Hand out a shard; one that has failed before runs alone, so that no other is blamed for it. ``flying``: the host's."""
        if any(shard.name in self.attempts for shard in flying) or (flying and len(self.queue) <= self._coming()):
            return
        shard = self._next(alone=not flying)
        if shard is not None:
            self.flights[host.run.remote(shard.name, self.work.payload(shard))] = (host, shard)
            self.alive_at[host] = time.monotonic()
            flying.append(shard)

    def _coming(self) -> int:
        """How many workers will soon be there for a shard each; where they come as nodes do, nobody waits for them."""
        resources = self.hosts.resources
        return max(0, resources.workers - len(self.node_of)) if resources.least is None else 0

    def _next(self, alone: bool) -> Shard | None:
        """The first shard that may be tried now, or None: also where one that failed waits for a worker of its own."""
        now = time.monotonic()
        for shard in self.queue:
            if self.not_before.get(shard.name, 0.0) > now:
                continue
            if shard.name in self.attempts and not alone:
                return None
            self.queue.remove(shard)  # the first, or behind a few that wait
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
            self._lost(host, [shard], f"its worker was lost ({first_line(error)})", _took_node(error))
            return
        if status == LEAVING:
            self._notice(host)
            self.queue.appendleft(shard)
            return
        if status == "error":
            raise RunFailed(self._explain(shard.name, result))
        self.alive_at[host] = time.monotonic()
        if status == "retry":
            self._failed(shard, self._explain("", result))
            return
        self.set_aside_in_a_row = 0
        self.finished_units += shard.units
        self.work.done(shard, result)

    def _notice(self, host: Any) -> None:
        """A worker's machine will be taken away: it finishes what it has, and the others do the rest."""
        if host in self.node_of and host not in self.leaving:
            self.leaving.add(host)
            self.task.progress.warn("a worker was told to end (SIGTERM): it finishes what it has, others do the rest")

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
                    reason, with_node = f"its worker was lost ({first_line(error)})", _took_node(error)
            elif time.monotonic() - doubt.since < DOUBT_SECONDS and self.node_of.get(host) not in _dead_nodes():
                continue
            del self.doubtful[host]
            self._lost(host, doubt.shards, reason, with_node)

    def _lost(self, host: Any, shards: Iterable[Shard], reason: str, with_node: bool) -> None:
        """A worker is gone: its shards go back into the queue."""
        with_node = with_node or host in self.leaving or self.node_of.get(host) in _dead_nodes()
        also = [future for future, (other, _) in self.flights.items() if other is host]
        for shard in [*shards, *(self.flights.pop(future)[1] for future in also)]:
            lost = self.lost_nodes.get(shard.name, 0) + 1
            if with_node and lost <= LOST_NODES:
                self.lost_nodes[shard.name] = lost
                self.queue.append(shard)
                self.task.progress.warn(f"{shard.name}: its node went away, it is done again elsewhere")
            else:
                self._failed(shard, reason)
        self._retire(host)

    def _failed(self, shard: Shard, reason: str) -> None:
        """An attempt at a shard failed: later again, or set aside."""
        attempt = self.attempts[shard.name] = self.attempts.get(shard.name, 0) + 1
        self.task.progress.warn(f"{shard.name}: {reason} (attempt {attempt} of {ATTEMPTS})")
        if attempt < ATTEMPTS:
            self.not_before[shard.name] = time.monotonic() + RETRY_SECONDS * 2 ** (attempt - 1)
            self.queue.appendleft(shard)  # soon, so that what every shard will meet is known before all have been tried
            return
        self.set_aside[shard.name] = reason
        self.set_aside_in_a_row += 1
        if self.set_aside_in_a_row >= SET_ASIDE_IN_A_ROW and len(self.queue) + len(self.flights) > 0:
            raise RunFailed(told_set_aside(self.set_aside, THE_REST_WAS_LEFT))

    def _retire(self, host: Any) -> None:
        for known in (self.seen, self.alive_at, self.node_of, self.asked):
            known.pop(host, None)  # type: ignore[attr-defined]  # dicts of different values, to mypy no dicts
        self.leaving.discard(host)
        self.hosts.end(host)

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
                units, leaving = ray.get(future)
            except RayError:
                continue  # its shards' futures will say so
            if leaving:
                self._notice(host)
            if units != self.seen.get(host):
                self.alive_at[host] = now
            self.seen[host] = units
        if self.starting and not any(node["Alive"] for node in ray.nodes()):
            raise RunFailed("Ray has no node left that could start a worker; run the same command again, it goes on")
        least = self.hosts.resources.least
        if least is not None and len(self.node_of) >= least:
            self.alive_at.update(dict.fromkeys(self.starting.values(), now))  # they wait for room, which may come
        for host in [*busy, *self.starting.values()]:
            if now - self.alive_at.get(host, now) > self.timeout:
                self._hung(host)
        sizes = {shard.name: shard.units for _, shard in self.flights.values()}  # what helps others has none
        running = sum(min(done, sizes.get(name, 0)) for host in busy for name, done in self.seen.get(host, {}).items())
        self.task.at(self.finished_units + running)

    def _hung(self, host: Any) -> None:
        limit = f"cluster.shard_timeout={self.timeout:g} s"
        for future, other in list(self.starting.items()):
            if other is host:
                del self.starting[future]
                self.task.progress.warn(f"a worker did not start within {limit}")
                self._no_start(
                    host,
                    f"no worker could be started within {limit}: the cluster must have {self.hosts.resources.each} free"
                    + (f" for each of {least} workers" if (least := self.hosts.resources.least or 1) > 1 else ""),
                )
                return
        self._lost(host, [], f"its worker made no progress for {limit}", False)

    def _explain(self, where: str, error: tuple[str, str, bool]) -> str:
        return explained(where, error, self.debug)


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

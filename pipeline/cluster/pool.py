"""A pool of workers, and values that go to all of them once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from alphatoken.pipeline.cluster.board import RayBoard
from alphatoken.pipeline.cluster.host import Hosts, kill
from alphatoken.pipeline.cluster.shard_loop import ShardLoop
from alphatoken.pipeline.cluster.work import Board, Lost, Resources, Shard, Shared, Work, Worker
from alphatoken.pipeline.run.failure import first_line
from alphatoken.pipeline.run.progress import Task


class WorkerPool:
    """Workers made by ``make(**arguments)``, one to a process, until the end of the ``with`` block.

    ``timeout``: seconds without progress after which a worker is taken for hung. ``debug``: tracebacks in messages.
    ``idle``: processes with as many CPUs to begin with, to which it leaves its own when it ends well; None: they end.
    """

    def __init__(
        self, make: Callable[..., Worker], arguments: dict[str, Any], resources: Resources, timeout: float, debug: bool,
        idle: list[Any] | None = None,
    ) -> None:  # fmt: skip
        self.arguments, self.timeout, self.debug = arguments, timeout, debug
        self.hosts = Hosts(make, arguments, resources, idle)
        self.store: Callable[[Any], Shared] = InStore
        self.workers = resources.workers
        self.boards: list[RayBoard] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: object = None, *_: object) -> None:
        for board in self.boards:
            kill(board.actor)
        self.hosts.close(keep=kind is None)

    def board(self, leads: Sequence[str]) -> Board:
        """See ``work.Pool``."""
        self.boards.append(RayBoard(leads))
        return self.boards[-1]

    def start(self) -> None:
        """Start all workers now and wait for none: for a pool whose first call has fewer shards than workers."""
        while len(self.hosts.all) < self.hosts.resources.workers:
            self.hosts.start()

    def run(
        self, shards: Sequence[Shard], payload: Callable[[Shard], Any], done: Callable[[Shard, Any], None], task: Task
    ) -> None:
        """Run every shard once, in any order; ``done(shard, result)`` is called in the driver for each.

        ``payload(shard)`` is made when the shard is handed out, so that at most two per worker are in memory. Raises
        RunFailed at once when a worker reports an error that would come again, and at the end when shards had to be
        set aside, with the reasons.
        """
        ShardLoop(self.hosts, Work(shards, payload, done, task), self.timeout, self.debug).run()


class InStore:
    """As ``work.Shared``: a value in the cluster's object store, until the process that has put it there ends.

    Whoever holds one without asking for the value, as the driver, holds a name. Raises Lost where there is no room for it.
    """

    def __init__(self, value: Any) -> None:
        self.keeper = ray.get_runtime_context().get_worker_id()
        try:
            self.reference = ray.put(value)
        except RayError as error:  # the store and the disk that it spills to are full
            raise Lost(first_line(error)) from error

    def get(self) -> Any:
        """The value; numpy arrays in it are read-only views of the store's memory."""
        try:
            return ray.get(self.reference)
        except RayError as error:  # Ray takes a second to be sure of it
            raise Lost(f"Ray's object store has lost it ({type(error).__name__})") from error

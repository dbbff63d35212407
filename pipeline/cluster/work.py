"""What is handed to workers and comes back, whoever they are: processes of Ray, or this one. No Ray here."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from alphatoken.pipeline.run.failure import RunFailed

if TYPE_CHECKING:
    from alphatoken.pipeline.run.progress import Task  # with rich, which workers do not need

ATTEMPTS = 3
MOST_THREADS = 8  # of a worker without a GPU, unless the settings say otherwise
RETRY_SECONDS = 2.0  # before a shard is tried again; doubled each time
THE_REST_IS_DONE = "all others are finished"
THE_REST_WAS_LEFT = "and no other was finished meanwhile, so that the rest was not tried"
SET_ASIDE_IN_A_ROW = 3  # with no success between them it is not the shards: a disk is full, a store is gone

# A worker is called with (payload, advance); it calls advance(units) as it goes and returns a picklable result.
Worker = Callable[[Any, Callable[[int], None]], Any]


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker takes, and how many workers there are.

    ``least``: None, or as many as are waited for, while there are more of them, up to ``workers``, where and when there is room.
    """

    workers: int
    cpus: int
    gpus: float
    least: int | None = None

    @property
    def each(self) -> str:
        """What one takes, for messages."""
        return f"{self.cpus} CPU{'s' * (self.cpus != 1)}" + (f" and {gpus_said(self.gpus)}" if self.gpus else "")


def gpus_said(count: float) -> str:
    """A number of GPUs in words, for messages; one worker may take a part of one."""
    return f"{count:g} GPU{'s' * (count > 1)}" if count else "no GPU"


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of work: its name in messages, and its size in units of progress."""

    name: str
    units: int


@dataclass(frozen=True, slots=True)
class Work:
    """Shards, what each is handed out with, who is told of its result, and where progress is shown."""

    shards: Sequence[Shard]
    payload: Callable[[Shard], Any]
    done: Callable[[Shard, Any], None]
    task: Task


class Lost(RuntimeError):
    """A shared value is gone with the process or the node that held it, or found no room."""


class Shared(Protocol):
    """A value that goes to all workers once and is read there by those whose shards name it.

    ``keeper``: the process that holds it; what one of them holds is lost together.
    """

    keeper: str

    def get(self) -> Any:
        """The value; numpy arrays in it are not to be written to. Raises Lost."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a helper takes from a board: the number of a part of what ``lead`` offers as ``work``; ``key``: of that offer."""

    lead: str
    key: int
    number: int
    work: Shared


class Board(Protocol):
    """Where leads offer parts of their work and helpers take them. Raises Lost where it is gone."""

    def offer(self, lead: str, work: Shared, count: int) -> None:
        """Parts 0 to ``count`` - 1 of ``work``, in the place of what the lead offered before."""

    def claim(self, lead: str, number: int) -> bool:
        """Whether the lead may make a part itself: nobody has taken it."""

    def take(self) -> Part | None:
        """A part for a helper, which nobody else gets; None: there is none now."""

    def over(self) -> bool:
        """Whether all leads have left."""

    def deliver(self, part: Part, result: Shared) -> None:
        """What has become of a part that was taken."""

    def result(self, lead: str, number: int) -> Shared | None:
        """What was delivered of a part of the present offer."""

    def leave(self, lead: str) -> None:
        """The lead has done its work."""


class Pool(Protocol):
    """Workers made by the same factory with ``arguments``, until the end of the ``with`` block.

    ``store`` keeps a value where all workers can read it: a worker calls it, so that a shard's result can name the value
    without its passing through the driver, or the driver does. ``workers``: how many there may be. ``board(leads)``: a new one,
    until the end of the block; where there is one worker, None.
    """

    arguments: dict[str, Any]
    store: Callable[[Any], Shared]
    workers: int
    board: Callable[[Sequence[str]], Board | None]

    def __enter__(self) -> Pool:
        """Begin; workers are made when there is work."""

    def __exit__(self, kind: object = None, *_: object) -> None:
        """Let go of all workers."""

    def start(self) -> None:
        """Start all workers now and wait for none."""

    def run(
        self, shards: Sequence[Shard], payload: Callable[[Shard], Any], done: Callable[[Shard, Any], None], task: Task
    ) -> None:
        """Run every shard once, in any order; ``done(shard, result)`` is called in the driver for each.

        ``payload(shard)`` is made when the shard is handed out. Raises RunFailed at once when a worker reports an error that
        would come again, and at the end when shards had to be set aside, with the reasons.
        """


def caught(work: Callable[[], Any]) -> tuple[str, Any]:
    """("ok", result), ("error", ...) for what will be the same next time, or ("retry", ...) for what may pass."""
    try:
        return "ok", work()
    except Exception as error:
        kind = "retry" if isinstance(error, OSError | MemoryError) or _NO_MEMORY in str(error) else "error"
        return kind, (f"{type(error).__name__}: {error}", traceback.format_exc(), isinstance(error, RunFailed))


_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"


def explained(where: str, error: tuple[str, str, bool], debug: bool) -> str:
    """An error of ``caught`` for people; ``debug``: with its traceback."""
    message, trace, expected = error
    if expected:
        message = message.partition(": ")[2]
    if any(f"[Errno {code}]" in message or f"[errno {code}]" in message for code in (errno.ENOSPC, errno.EDQUOT)):
        message += " (the disk is full)"
    return (f"{where}: " if where else "") + message + (f"\n{trace}" if debug else "")


def told_set_aside(set_aside: Mapping[str, str], others: str) -> str:
    """``set_aside``: shard -> reason; ``others``: what became of the rest."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in set_aside.items())
    return (
        f"{len(set_aside)} shard(s) failed {ATTEMPTS} times and were set aside, {others}: {reasons}; remove the "
        "cause, then run the same command again"
    )


def cpus_here() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

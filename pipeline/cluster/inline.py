"""cluster.address=inline: one worker in the driver's own process, without Ray. The same bytes as with one worker of Ray.

For data on which the start of a cluster would take longer than the work. Nothing is replaced here: a worker that dies
takes the driver with it, and the same command goes on with what is finished.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from alphatoken.pipeline.cluster.work import (
    ATTEMPTS,
    MOST_THREADS,
    RETRY_SECONDS,
    SET_ASIDE_IN_A_ROW,
    THE_REST_IS_DONE,
    THE_REST_WAS_LEFT,
    Board,
    Resources,
    Shard,
    Shared,
    Worker,
    caught,
    cpus_here,
    explained,
    gpus_said,
    told_set_aside,
)
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.progress import Task
from alphatoken.pipeline.settings import ClusterSettings

GETS_READY = "the worker gets ready"
SHOWN_SECONDS = 1.0  # between two looks at a task whose worker is not there yet


class InlineCluster:
    """Stands where a cluster would: ``cluster.address=inline``."""

    def __init__(self, settings: ClusterSettings, debug: bool) -> None:
        self.settings, self.debug = settings, debug

    def __enter__(self) -> InlineCluster:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to end."""

    def pool(self, make: Callable[..., Worker], arguments: dict[str, Any], resources: Resources) -> InlinePool:
        """A pool of one worker, made by ``make(**arguments)``."""
        return InlinePool(make, arguments, resources.cpus, self.debug)

    def model_resources(self) -> Resources:
        """One worker with all CPUs, at most 8, and a GPU where there is one, unless the settings say otherwise."""
        asked, gpus = self.settings.cpus_per_worker, self.settings.gpus_per_worker
        has = torch.cuda.is_available()
        found = (1.0 if has else 0.0) if isinstance(gpus, str) else gpus
        seen = torch.cuda.device_count() if has else 0
        if found > seen:
            remedy = f"set it to {seen} at most" if has else "leave it out"
            raise RunFailed(
                f"cluster.gpus_per_worker={gpus:g}: this machine has {gpus_said(seen)} that torch can use: {remedy}"
            )
        usual = 1 if found else max(1, min(MOST_THREADS, cpus_here()))
        return Resources(1, usual if isinstance(asked, str) else asked, found)

    def tokenizer_resources(self) -> Resources:
        """One worker with one CPU."""
        return Resources(1, 1, 0.0)

    def end_idle(self) -> None:
        """No process waits."""


class InlinePool:
    """One worker, made when there is work, let go of at the end. As ``work.Pool``."""

    def __init__(self, make: Callable[..., Worker], arguments: dict[str, Any], cpus: int, debug: bool) -> None:
        self.make, self.arguments, self.cpus, self.debug = make, arguments, cpus, debug
        self.worker: Worker | None = None
        self.store: Callable[[Any], Shared] = Here
        self.workers = 1
        self.threads = torch.get_num_threads()

    def __enter__(self) -> InlinePool:
        torch.set_num_threads(self.cpus)
        return self

    def __exit__(self, *_: object) -> None:
        self.worker = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch.set_num_threads(self.threads)

    def start(self) -> None:
        """There is one worker, and nothing to do meanwhile."""

    def board(self, leads: Sequence[str]) -> Board | None:
        """There is nobody else."""
        return None

    def run(
        self, shards: Sequence[Shard], payload: Callable[[Shard], Any], done: Callable[[Shard, Any], None], task: Task
    ) -> None:
        """Run every shard once, in order; what a disk or the memory refuses is tried again. Raises RunFailed."""
        waiting, attempts = deque(shards), dict.fromkeys((shard.name for shard in shards), 0)
        set_aside: dict[str, str] = {}
        in_a_row = 0
        if waiting and self.worker is None:
            with _shown(task):
                self.worker = self._started(task)
        while waiting:
            shard, before = waiting.popleft(), task.done
            kind, result = self._tried(payload(shard), task)
            if kind == "error":
                raise RunFailed(explained(shard.name, result, self.debug))
            if kind == "ok":
                task.at(before + shard.units)
                done(shard, result)
                in_a_row = 0
                continue
            task.at(before)
            attempts[shard.name] += 1
            reason = explained("", result, self.debug)
            task.progress.warn(f"{shard.name}: {reason} (attempt {attempts[shard.name]} of {ATTEMPTS})")
            if attempts[shard.name] < ATTEMPTS:
                time.sleep(RETRY_SECONDS * 2 ** (attempts[shard.name] - 1))
                waiting.appendleft(shard)
                continue
            set_aside[shard.name] = reason
            in_a_row += 1
            if in_a_row >= SET_ASIDE_IN_A_ROW and waiting:
                raise RunFailed(told_set_aside(set_aside, THE_REST_WAS_LEFT))
        if set_aside:
            raise RunFailed(told_set_aside(set_aside, THE_REST_IS_DONE))

    def _tried(self, payload: Any, task: Task) -> tuple[str, Any]:
        worker = self.worker
        assert worker is not None
        return caught(lambda: worker(payload, task.advance))

    def _started(self, task: Task) -> Worker:
        for attempt in range(1, ATTEMPTS + 1):
            kind, made = caught(lambda: self.make(**self.arguments))
            if kind == "ok":
                return made
            reason = explained("a worker cannot start", made, self.debug)
            if kind == "error" or attempt == ATTEMPTS:
                raise RunFailed(reason)
            task.progress.warn(f"{reason} (attempt {attempt} of {ATTEMPTS})")
            time.sleep(RETRY_SECONDS)
        raise AssertionError("the last attempt returns or raises")


@contextmanager
def _shown(task: Task) -> Iterator[None]:
    """Keep the display of ``task`` alive, with what it waits for, while this thread is busy with what counts no units."""
    noted, ended = task.noted, threading.Event()

    def look() -> None:
        while not ended.wait(SHOWN_SECONDS):
            task.at(task.done)

    thread = threading.Thread(target=look, daemon=True, name="progress")
    task.note(", ".join(filter(None, [noted, GETS_READY])))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        task.note(noted)


class Here:
    """A value of this process, as ``work.Shared``."""

    def __init__(self, value: Any) -> None:
        self.value, self.keeper = value, "this process"

    def get(self) -> Any:
        """The value."""
        return self.value

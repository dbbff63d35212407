"""One survey in a process of its own: a crash, an endless loop or a model too large ends that row and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from time import monotonic

import torch
import transformers

from benchmarks.models.compare import RAW, Row, survey
from benchmarks.models.small import ModelType

SECONDS = 120.0
BYTES = 6 << 30


def surveyed(kinds: Sequence[ModelType], jobs: int = 1, seconds: float = SECONDS) -> Iterator[Row]:
    """A row per type as they are done, ``jobs`` at a time."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # small models; and a forked process must not inherit a pool of threads
    context = multiprocessing.get_context("fork")  # imports are paid once
    left = list(reversed(kinds))
    running: dict[Connection, tuple[multiprocessing.process.BaseProcess, ModelType, float]] = {}
    while left or running:
        while left and len(running) < jobs:
            kind = left.pop()
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(kind, there), daemon=True)
            process.start()
            there.close()
            running[here] = (process, kind, monotonic() + seconds)
        soonest = min(end for _, _, end in running.values())
        ready = wait(list(running), timeout=max(0.0, soonest - monotonic()))
        for pipe, (process, kind, end) in list(running.items()):
            if pipe in ready:
                yield _received(pipe, process, kind)
            elif monotonic() >= end:
                process.kill()
                process.join()
                yield Row(kind.title, kind.owner, RAW, f"not done after {seconds:.0f} s")
            else:
                continue
            del running[pipe]
            pipe.close()


def _work(kind: ModelType, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)  # warnings of a few hundred model types
    pipe.send(survey(kind))


def _received(pipe: Connection, process: multiprocessing.process.BaseProcess, kind: ModelType) -> Row:
    try:
        row = pipe.recv()
    except EOFError:
        process.join()
        return Row(kind.title, kind.owner, RAW, f"its process ended with status {process.exitcode}")
    process.join()
    return row

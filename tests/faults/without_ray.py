"""Drivers that are killed again and again, cheaply: whole pipelines in forked processes without Ray.

The stages, the files and the manifest are the real ones; workers run in the driver's own process. A forked driver has
everything imported already, so that an attempt takes as long as its work. Half of the drivers are killed from outside
at a random moment after they have claimed the run directory, the others kill themselves at a random step of writing a
file: just opened, complete but not yet renamed, just renamed.

    python -m tests.faults.without_ray KILLS SEED key=value ...

prints how often it killed and how often the run was not finished then, and goes on until the run is done.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time

LONGEST_DELAY = 0.12  # seconds from the claim to a kill from outside
LATEST_STEP = 30  # of writing, where a driver kills itself


def driver(arguments: list[str], claimed: int, die_at_step: int | None) -> int:
    """One driver; writes a byte to ``claimed`` when the run directory is its own. Returns the exit status."""
    import torch

    from alphatoken.jobs import session
    from alphatoken.jobs.cli import main
    from alphatoken.pipeline.run import storage

    torch.set_num_threads(1)
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == die_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    enter, to_disk, claim = storage._Rename.__enter__, storage._to_disk, session.Session.claim

    def entering(self):
        stream = enter(self)
        step()
        return stream

    def writing(path):
        step()
        to_disk(path)

    def claiming(self):
        claim(self)
        os.write(claimed, b"1")

    upload = storage.Storage._upload

    def uploading(self, name, content):
        step()
        upload(self, name, content)
        step()

    storage.Storage._upload = uploading
    storage._Rename.__enter__ = entering
    storage._to_disk = writing
    session.Session.claim = claiming
    return main([*arguments, "cluster.address=inline"])


def fork(arguments: list[str], die_at_step: int | None = None) -> tuple[int, int]:
    """Start a driver; returns its process and the pipe on which it says that it has claimed the directory."""
    reads, writes = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reads)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        try:
            status = driver(arguments, writes, die_at_step)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            status = 70
        os._exit(status)
    os.close(writes)
    return process, reads


def interrupt(arguments: list[str], kills: int, seed: int) -> dict[str, int]:
    """Kill ``kills`` drivers of one run, then let one finish; returns what happened."""
    draw, run = (
        random.Random(seed),
        next(a.removeprefix("run.dir=").strip("'") for a in arguments if a.startswith("run.dir=")),
    )
    done, unfinished = 0, 0
    while done < kills:
        outside = draw.random() < 0.5
        delay, step = draw.uniform(0.0, LONGEST_DELAY), draw.randint(1, LATEST_STEP)
        process, claimed = fork(arguments, None if outside else step)
        if outside:
            select.select([claimed], [], [], 60)
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(claimed)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and os.WEXITSTATUS(status) != 0:
            raise SystemExit(f"a driver ended with status {os.WEXITSTATUS(status)} by itself")
        done += killed
        unfinished += killed and not finished(run)
    process, claimed = fork(arguments)
    _, status = os.waitpid(process, 0)
    return {"kills": done, "unfinished": unfinished, "status": os.WEXITSTATUS(status)}


def finished(run: str) -> bool:
    """Whether the last stage of a run is done; found out in a process of its own, since clients do not survive a fork."""
    process = os.fork()
    if process == 0:
        from alphatoken.pipeline.run.storage import Storage

        storage = Storage(run)
        stages = storage.read_json("run.json")["stages"] if storage.exists("run.json") else {}
        os._exit(0 if stages.get("mask/default", {}).get("state") == "done" else 1)
    return os.waitpid(process, 0)[1] == 0


if __name__ == "__main__":
    import transformers  # noqa: F401 - once, for all the drivers to come

    import alphatoken.jobs.run
    import alphatoken.pipeline.anchor.stage
    import alphatoken.pipeline.mask.stage
    import alphatoken.pipeline.prepare.stage
    import alphatoken.pipeline.value.rehearsal
    import alphatoken.pipeline.value.stage  # noqa: F401

    print(json.dumps(interrupt(sys.argv[3:], int(sys.argv[1]), int(sys.argv[2]))))

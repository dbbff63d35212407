"""alphatoken stop: stop a submitted job. What it has finished stays; submitting it again goes on from there."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from alphatoken.jobs.status import found, job_of
from alphatoken.pipeline.run.failure import RunFailed

STOP_SECONDS = 60.0


def execute(arguments: Sequence[str]) -> int:
    """Stop the job and wait until it has."""
    client, job = job_of("stop", arguments)
    if found(client, job).status.is_terminal():
        print(f"{job}  {found(client, job).status.value.lower()} already")
        return 0
    client.stop_job(job)
    asked = time.monotonic()
    while not found(client, job).status.is_terminal():
        if time.monotonic() - asked > STOP_SECONDS:
            raise RunFailed(f"job {job} did not stop within {STOP_SECONDS:g} s")
        time.sleep(0.2)
    print(f"{job}  {found(client, job).status.value.lower()}")
    return 0


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["stop", *sys.argv[1:]]))

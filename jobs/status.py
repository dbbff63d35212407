"""alphatoken status: how a submitted job is. Exit status 1 for a job that failed or was stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from alphatoken.jobs.cli import COMMANDS, parse
from alphatoken.jobs.config import load
from alphatoken.jobs.job_api import connect
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong, first_line


def execute(arguments: Sequence[str]) -> int:
    """Print one line about the job."""
    client, job = job_of("status", arguments)
    info = found(client, job)
    state = info.status.value
    print(f"{job}  {state.lower()}{_since(info)}  {info.entrypoint}")
    if state == "FAILED" and info.message:
        print(" ".join(info.message.split())[:500])
    return 1 if state in ("FAILED", "STOPPED") else 0


def job_of(command: str, arguments: Sequence[str]) -> tuple[Any, str]:
    """(client, job id) of a command line `<job id> [cluster.dashboard=...]`. Raises SettingsWrong and RunFailed."""
    parsed = parse(command, arguments, COMMANDS[command].options)
    ids = [argument for argument in parsed.overrides if "=" not in argument]
    if len(ids) != 1:
        raise SettingsWrong([f"alphatoken {command}: give the id of one job, as `alphatoken submit` printed it"])
    settings = load([argument for argument in parsed.overrides if "=" in argument])
    return connect(settings.cluster.dashboard), ids[0]


def found(client: Any, job: str) -> Any:
    """What the cluster knows about the job. Raises RunFailed for an unknown one."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        raise RunFailed(f"job {job}: the cluster does not know it ({first_line(error)[:200]})") from error


def _since(info: Any) -> str:
    if not info.start_time:
        return ""
    end = info.end_time / 1000 if info.end_time else time.time()
    return f" after {end - info.start_time / 1000:.0f} s"


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["status", *sys.argv[1:]]))

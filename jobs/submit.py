"""alphatoken submit: run a stage as a job on a Ray cluster, through Ray's job API.

The working directory is packed without runs, caches and what its .gitignore files name, and AlphaToken's own package goes along, so that
the cluster needs the dependencies alone. To resume a job, submit it again.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from alphatoken.jobs.cli import COMMANDS, Arguments, parse, settings_of
from alphatoken.jobs.config import load
from alphatoken.jobs.job_api import connect
from alphatoken.jobs.packing import what_is_packed
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong, first_line
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.spelling import quoted

PARTS = ("jobs", "pipeline", "conf", "data_schemas")
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "ALPHATOKEN_CACHE", "MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT")
TOO_LARGE = ("413", "exceeds the maximum size")  # of the job API, and of Ray's own packing
NOT_READY, READY_SECONDS = "No available agent", 90.0  # what a cluster answers that has just been started
SETTLE_SECONDS = 30.0  # a job's log may end a little before its state is final


def execute(arguments: Sequence[str]) -> int:
    """Submit, stream the log, and return the job's exit status; with --no-wait print its id and return 0."""
    stage, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    stages = [name for name, command in COMMANDS.items() if command.kind == "stage"]
    if stage not in stages:
        raise SettingsWrong(
            [f"alphatoken submit {stage}: give one of the stages {', '.join(stages)}".replace(" :", ":")]
        )
    parsed = parse("submit", rest, COMMANDS["submit"].options)
    settings = _checked(stage, parsed)
    entrypoint = shlex.join(["python", "-m", "alphatoken.jobs", stage, *_job_arguments(rest, parsed, settings)])
    client = connect(settings.cluster.dashboard)
    job = _submit(client, entrypoint)
    print(f"job {job}: {entrypoint}", file=sys.stderr)
    if "--no-wait" in parsed.flags:
        print(job)
        return 0
    try:
        return _follow(client, job)
    except KeyboardInterrupt:
        print(
            f"alphatoken submit: the job goes on; see `alphatoken status {job}`, `alphatoken stop {job}`",
            file=sys.stderr,
        )
        return 130


def _checked(stage: str, parsed: Arguments) -> Settings:
    """Settings are checked here, so that a typing mistake costs no upload."""
    if "--multirun" not in parsed.flags:
        return settings_of(stage, parsed)
    from alphatoken.jobs.sweep import sweep_points

    points, _ = sweep_points(parsed.overrides, parsed.recorded)
    base = [o for o in parsed.overrides if o.partition("=")[0] in ("run.dir", "cluster.dashboard")]
    own = load(base, parsed.recorded)
    return replace(points[0].settings, run=own.run, cluster=own.cluster)


def _job_arguments(rest: Sequence[str], parsed: Arguments, settings: Settings) -> list[str]:
    """The stage's arguments on the cluster: its Ray, and a run directory that outlives the job's working directory."""
    found = [_absolute_from(before, own) for before, own in pairwise(("", *rest)) if own != "--no-wait"]
    keys = {override.partition("=")[0].lstrip("+") for override in parsed.overrides}
    if not keys & {"cluster", "cluster.address"}:
        found.append("cluster.address=auto")
    place = settings.run.dir
    swept = "run.dir" in keys and "--multirun" in parsed.flags and "," in place
    said = next((o.partition("=")[2] for o in reversed(parsed.overrides) if o.startswith("run.dir=")), place)
    if "://" not in place and not os.path.isabs(said) and not swept:
        absolute = os.path.abspath(place)
        found = [argument for argument in found if not argument.startswith("run.dir=")]
        found.append(f"run.dir={quoted(absolute)}")
        print(f"run.dir is {absolute}: every node must see it there, or give a URI", file=sys.stderr)
    return found


def _absolute_from(before: str, argument: str) -> str:
    """An argument with the file of --from by its whole path: where it lies in a run directory it is not sent along."""
    option, equals, place = argument.partition("=")
    if option != "--from" or not equals:
        option, equals, place = "", "", argument
        if before != "--from":
            return argument
    return option + equals + (place if "://" in place else os.path.abspath(os.path.expanduser(place)))


def _submit(client: Any, entrypoint: str) -> str:
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    packed = what_is_packed(Path.cwd())
    for line in packed.told():
        print(line, file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        runtime = {
            "working_dir": os.getcwd(),
            "excludes": list(packed.excludes),
            "py_modules": [_own_package(Path(scratch))],
            "env_vars": {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1", **environment},
        }
        asked = time.monotonic()
        while True:
            try:
                return client.submit_job(entrypoint=entrypoint, runtime_env=runtime)
            except Exception as error:
                starting = NOT_READY in str(error) and time.monotonic() - asked < READY_SECONDS
                if not starting:
                    too_large = any(sign in str(error) for sign in TOO_LARGE)
                    hint = f"; {packed.size_told()}: name what is not needed in .gitignore" if too_large else ""
                    raise RunFailed(f"the job could not be submitted: {first_line(error)}{hint}") from error
                time.sleep(1.0)


def _own_package(scratch: Path) -> str:
    """This package as one folder below ``scratch``, as a wheel has it: of an editable install the parts lie apart."""
    target, unwanted = scratch / "alphatoken", shutil.ignore_patterns("__pycache__")
    target.mkdir()
    shutil.copy(str(files("alphatoken") / "__init__.py"), target)
    for part in PARTS:
        shutil.copytree(str(files(f"alphatoken.{part}")), target / part, ignore=unwanted)
    return str(target)


def _follow(client: Any, job: str) -> int:
    """Copy the job's log to stdout until it ends; its driver's exit status, 1 where it has none."""

    async def stream() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    asyncio.run(stream())
    waited = time.monotonic()
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() - waited > SETTLE_SECONDS:
            raise RunFailed(f"the log of job {job} ended, but the job has not; see `alphatoken status {job}`")
        time.sleep(0.2)
    info = client.get_job_info(job)
    state = info.status.value
    print(f"job {job}: {state.lower()}", file=sys.stderr)
    if state == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None and info.message:
        print(f"alphatoken submit: {' '.join(info.message.split())[:500]}", file=sys.stderr)
    return info.driver_exit_code or 1


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["submit", *sys.argv[1:]]))

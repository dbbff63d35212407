"""The plan against real runs: `python -m benchmarks.plan` prints tables for three row counts of the embedded example.

`plan --measure` first, in a cache of its own; then for each size a plan and a run of the same settings in processes of their
own: seconds of the stages, bytes of the files. A second run in this process, under torch's counter, says how many operations
the anchor and value stages are. `--rows 12 24 48` picks sizes, `--uncounted` leaves the counter out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from alphatoken.jobs.cli import main as alphatoken
from alphatoken.pipeline.prepare.example import example_data
from benchmarks.operations import counted
from benchmarks.speed import machine

ROWS = (12, 24, 48)
HELD_OUT = ["data.validation=8", "anchor.fisher.prompts=8", "anchor.fisher.max_new_tokens=32"]
HELD_OUT_ROWS = 16
DIRECTORIES = {"prepared": "prepared/*", "values": "values/*", "masks, each": "masks/default/data/*.parquet"}
ANCHORS = ("anchors/*.safetensors", "anchors/*/*")


def rows_file(place: Path, count: int) -> Path:
    """The first rows of the code problems, so many that ``count`` are trained on; all again where they are too few."""
    lines = Path(example_data(print)).read_text(encoding="utf-8").splitlines()
    wanted = count + HELD_OUT_ROWS
    chosen = (lines * -(-wanted // len(lines)))[:wanted]
    place.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return place


def command(environment: Mapping[str, str], *arguments: str) -> str:
    """Run `alphatoken` in a process of its own; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *arguments], env=dict(environment), check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def operations_of(stage: str, settings: list[str]) -> int:
    """Operations of one stage, run in this process."""

    def work() -> None:
        if status := alphatoken([stage, *settings]):
            raise SystemExit(f"alphatoken {stage} ended with {status}")

    return counted(work)


def size_of(run: Path, *patterns: str) -> int:
    """Bytes of the files of a run that match."""
    return sum(file.stat().st_size for pattern in patterns for file in run.glob(pattern))


def line(rows: int, what: str, planned: float, found: float, form: str) -> None:
    """One row of the table."""
    print(f"| {rows} | {what} | {planned:{form}} | {found:{form}} | {planned / found - 1:+.1%} |", flush=True)


def compared(place: Path, rows: int, environment: Mapping[str, str], with_counter: bool) -> None:
    """Plan and run one size, and print its lines."""
    settings = [f"data.train={rows_file(place / f'{rows}.jsonl', rows)}", *HELD_OUT]
    own = [f"run.dir={place}/run-{rows}", *settings]
    plan = json.loads(command(environment, "plan", *own, "--json"))
    command(environment, "run", *own, "log_level=warning")
    run = place / f"run-{rows}"
    stages = json.loads((run / "run.json").read_text())["stages"]
    seconds = {name: record["seconds"] for name, record in stages.items()}
    here = dict(plan["seconds_here"])
    total = here.pop("total")
    for stage, planned in here.items():
        line(rows, f"{stage}, s", planned, seconds[stage], ".1f")
    line(rows, "all stages, s", total, sum(seconds.values()), ".1f")
    line(rows, "tokens", plan["data"]["tokens"], stages["value"]["counts"]["tokens"], ",.0f")
    for name, pattern in DIRECTORIES.items():
        line(rows, f"{name}, bytes", plan["storage"][name], size_of(run, pattern), ",.0f")
    line(rows, "anchors, bytes", plan["storage"]["anchors"], size_of(run, *ANCHORS), ",.0f")
    if with_counter:
        again = [f"run.dir={place}/counted-{rows}", *settings, "log_level=warning"]
        if status := alphatoken(["prepare", *again]):
            raise SystemExit(f"alphatoken prepare ended with {status}")
        for stage in ("anchor", "value"):
            line(rows, f"{stage}, FLOPs", plan["flops"][stage]["flops"], operations_of(stage, again), ".3e")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--uncounted", action="store_true")
    options = parser.parse_args()
    print(f"Machine: {machine()}\n")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model = str(Path(example_data(print)).parent / "SmolLM2-135M-Instruct")
        environment = {**os.environ, "ALPHATOKEN_CACHE": str(place / "cache")}
        (place / "cache").mkdir()
        for name in Path(
            model
        ).parent.iterdir():  # what was fetched stays where it is; calibrations are of this run alone
            if name.name != "calibrations":
                (place / "cache" / name.name).symlink_to(name)
        first = [f"run.dir={place}/none", f"data.train={rows_file(place / 'first.jsonl', ROWS[-1])}", *HELD_OUT]
        found = json.loads(command(environment, "plan", *first, "--measure", "--json"))["calibration"]
        rates = ", ".join(f"{name} {rate / 1e9:.1f} GFLOP/s" for name, rate in found["rates"].items())
        print(f"Measured in {found['seconds']:.0f} s: {rates}; model loaded in {found['load']:.1f} s.\n")
        print("| rows | what | plan | run | plan / run - 1 |\n|---|---|---|---|---|", flush=True)
        for rows in options.rows:
            compared(place, rows, environment, not options.uncounted)


if __name__ == "__main__":
    main()

"""What a report costs: `python -m benchmarks.report` prints the table of docs/look.md.

Values are drawn, so that no model is needed: prepared rows and every column of values/ as the stages leave them, a
vocabulary of 50,000 of which few ids are frequent, then masks, each made by the mask stage, and last the report in a
process of its own, whose seconds, CPU seconds and peak memory are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console

from alphatoken.data_schemas import PREPARED, SCORES, SIGNED, value_columns, values_schema
from alphatoken.pipeline.mask.stage import make_mask
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import MaskSettings, RunSettings, Settings, ValuationSettings

VOCABULARY, EOS, PER_PART = 50_000, 2, 20_000
COLUMNS = value_columns(tuple(SCORES))
MASKS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"score": "paper"},
    "third": {"rho": 0.3},
    "entropy": {"score": "entropy", "scope": "example"},
}
REPORT = """
import json, resource, sys, time
from benchmarks.report import run_of
from alphatoken.pipeline.report.stage import make_report
from alphatoken.pipeline.run.storage import Storage
before = resource.getrusage(resource.RUSAGE_SELF)
started, cpu = time.perf_counter(), time.process_time()
make_report(run_of(Storage(sys.argv[1])))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "before": before.ru_maxrss, "peak": after}
print(json.dumps(found))
"""


def run_of(storage: Storage, **mask: Any) -> Run:
    """What the stages are given; ``mask``: keys of it."""
    settings = Settings(run=RunSettings(seed=0), mask=MaskSettings(**mask))
    return Run(storage, Manifest(storage), settings, Progress(Console(quiet=True)))


def write_run(directory: str, rows: int, longest: int) -> Storage:
    """A run of ``rows`` examples with prompts and responses of 1 to ``longest`` tokens, as far as value."""
    storage, rng = Storage(directory), np.random.default_rng(0)
    manifest, count = Manifest(storage), -(-rows // PER_PART)
    parts = [f"part-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
    first = manifest.begin("prepare", {"rows": rows}, {})
    manifest.begin("anchor", {"anchor.drift": "warmup"}, {})
    inputs = {"prepare": first, "columns": list(COLUMNS)}
    second = manifest.begin("value", inputs, {"valuation": ValuationSettings(scores=list(SCORES))})
    for number, part in enumerate(parts):
        start, size = number * PER_PART, min(PER_PART, rows - number * PER_PART)
        prepared, values = _part(rng, start, size, longest, number)
        storage.write_table(f"prepared/{part}", prepared, first)
        storage.write_table(f"values/{part}", values, second)
    manifest.finish("prepare", 0.0, parts=parts, eos_token_ids=[EOS], vocabulary=VOCABULARY, format="sft")
    for stage in ("anchor", "value"):
        manifest.finish(stage, 0.0)
    return storage


def _part(rng: np.random.Generator, start: int, size: int, longest: int, number: int) -> tuple[pa.Table, pa.Table]:
    prompts, responses = rng.integers(1, longest + 1, size), rng.integers(1, longest + 1, size)
    lengths = prompts + responses
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = (EOS + 1 + (VOCABULARY - EOS - 1) * rng.random(offsets[-1]) ** 3).astype(np.int32)
    ids[offsets[1:] - 1] = EOS
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    inside = place >= np.repeat(prompts, lengths)

    def lists(flat: npt.NDArray[Any]) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))

    names = pa.array([f"row-{start + i}" for i in range(size)])
    sources = pa.array([f"data/file-{number:05d}.jsonl:{i}" for i in range(size)])
    labels = np.where(inside, ids, np.int32(-100))
    prepared = pa.Table.from_arrays([names, lists(ids), lists(labels), sources], schema=PREPARED)
    drawn = [rng.standard_normal(offsets[-1]).astype(np.float32) ** 3 * inside for _ in COLUMNS]
    columns = [lists(one if name in SIGNED else np.abs(one)) for name, one in zip(COLUMNS, drawn, strict=True)]
    return prepared, pa.Table.from_arrays([names, *columns], schema=values_schema(COLUMNS))


def measure(directory: str) -> dict[str, Any]:
    """A report in a process of its own; memory in KiB."""
    command = [sys.executable, "-c", REPORT, directory]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--longest", type=int, default=14, help="tokens of the longest prompt and response")
    asked = parser.parse_args()
    print("| rows | response tokens | masks | seconds | CPU seconds | peak memory, of which imports | page |")
    print("|---|---|---|---|---|---|---|")
    for rows in asked.rows:
        with tempfile.TemporaryDirectory() as directory:
            storage = write_run(directory, rows, asked.longest)
            made = [make_mask(run_of(storage, name=name, **settings)) for name, settings in MASKS.items()]
            one = measure(directory)
            page = os.path.getsize(Path(directory) / "report/index.html")
            print(
                f"| {rows:,} | {made[0]['response_tokens']:,} | {len(made)} | {one['seconds']:.0f} | {one['cpu']:.0f} | "
                f"{one['peak'] / 1024:,.0f} MiB, {one['before'] / 1024:,.0f} MiB | {page / 1e6:.1f} MB |",
                flush=True,
            )


if __name__ == "__main__":
    main()

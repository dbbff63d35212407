"""What nine masks cost against copying the same Parquet: `python -m benchmarks.masks --tokens 50000000`.

A run directory as prepare and value leave it, of synthetic tokens and values (ids as rare as words, values of normal and
log-normal numbers, which compress as little as real ones), then in turn, each in a process of its own:

- the sweep, `alphatoken mask -m` with three scores and three rho;
- nine copies: for each of the nine masks the columns that it reads are read, and columns as those of the mask are written
  (token ids twice, since labels compress less well, and a column of ones), with the same options of Parquet;
- one copy of all of prepared/ and values/.

CPU is that of the process with its threads. Memory is the highest resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alphatoken.data_schemas import PREPARED, is_signed, masks_schema, value_columns, values_schema
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import ValuationSettings

SCORES = ("paper", "information", "loss", "entropy", "gradient_norm")
COLUMNS = value_columns(SCORES, exact=False, reference_loss=False)
POINTS = {"information": ("information",), "entropy": ("entropy",), "paper": COLUMNS[:4]}  # score -> what it reads
RHOS = ("0.3", "0.5", "0.7")
ROWS, LENGTH, PROMPT = 2048, 400, 100  # rows of a part, tokens of a row, of them prompt
VOCABULARY = 49_152
EOS = 2


def write_run(place: str, tokens: int) -> int:
    """A run directory; returns its tokens. The parts are one another's tokens in another order, which is quickly made."""
    storage, rng = Storage(place), np.random.default_rng(0)
    count = max(1, round(tokens / (ROWS * LENGTH)))
    parts = [f"part-{index:05d}-of-{count:05d}.parquet" for index in range(count)]
    manifest = Manifest(storage)
    first = manifest.begin("prepare", {}, {})
    manifest.begin("anchor", {"anchor.drift": "warmup"}, {})
    valued = {"valuation": ValuationSettings(scores=list(SCORES))}
    second = manifest.begin("value", {"prepare": first, "columns": list(COLUMNS)}, valued)
    size = ROWS * LENGTH
    ids = np.minimum(rng.zipf(1.2, size) + 2, VOCABULARY - 1).astype(np.int32)
    drawn = {name: rng.standard_normal(size).astype(np.float32) for name in COLUMNS}
    drawn = {name: one if is_signed(name) else np.exp(one) for name, one in drawn.items()}
    response = np.arange(size) % LENGTH >= PROMPT
    offsets = pa.array(np.arange(ROWS + 1) * LENGTH, pa.int32())

    def lists(column: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(column))

    for index, part in enumerate(parts):
        shift = 7919 * index % size
        own = np.roll(ids, shift)
        own[LENGTH - 1 :: LENGTH] = EOS
        names = pa.array([f"row-{row}" for row in range(index * ROWS, (index + 1) * ROWS)])
        labels = np.where(response, own, np.int32(-100))
        table = pa.Table.from_arrays([names, lists(own), lists(labels), names], schema=PREPARED)
        storage.write_table(f"prepared/{part}", table, first)
        columns = [lists(np.roll(drawn[name], shift) * response) for name in COLUMNS]
        storage.write_table(
            f"values/{part}", pa.Table.from_arrays([names, *columns], schema=values_schema(COLUMNS)), second
        )
    manifest.finish("prepare", 0.0, parts=parts, eos_token_ids=[EOS], vocabulary=VOCABULARY, tokens=count * size)
    manifest.finish("anchor", 0.0)
    manifest.finish("value", 0.0)
    return count * size


def copy_nine(place: str) -> None:
    """Read what each mask reads, and write as much as it writes."""
    storage, out = Storage(place), Storage(f"{place}/copies")
    schema = masks_schema([], weighted=False)
    parts = storage.names("prepared")
    for score, columns in POINTS.items():
        for rho in RHOS:
            for name in parts:
                prepared = pq.read_table(storage.path(name), columns=["id", "input_ids", "labels"])
                pq.read_table(storage.path(name.replace("prepared/", "values/")), columns=["id", *columns])
                ids, labels = prepared["input_ids"].combine_chunks(), prepared["labels"].combine_chunks()
                ones = pa.ListArray.from_arrays(ids.offsets, pa.array(np.ones(len(ids.values), np.int8)))
                out.write_table(f"{score}-{rho}/{name}", pa.Table.from_arrays([ids, ones, labels], schema=schema), "")


def copy_once(place: str) -> None:
    """Read and write all of prepared/ and values/."""
    storage, out = Storage(place), Storage(f"{place}/copies")
    for directory in ("prepared", "values"):
        for name in storage.names(directory):
            out.write_table(f"once/{name}", pq.read_table(storage.path(name)), "")


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds by the clock and of CPU, and bytes of memory."""

    wall: float
    cpu: float
    memory: float


def measured(command: Sequence[str]) -> Cost:
    """Of a process."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *command])
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return Cost(time.monotonic() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--directory", default=None, help="where the disk has room; default: the temporary directory")
    parser.add_argument("--again", type=int, default=1, help="how often everything is measured; the least CPU counts")
    parser.add_argument("--copy", choices=("nine", "once"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.copy:
        (copy_nine if options.copy == "nine" else copy_once)(options.directory)
        return
    place = tempfile.mkdtemp(dir=options.directory)
    try:
        tokens = write_run(place, options.tokens)
        scores = f"mask.score={','.join(POINTS)}"
        commands = {
            "nine-point sweep": ["-m", "alphatoken.jobs", "mask", "-m", f"run.dir={place}", scores, f"mask.rho={','.join(RHOS)}"],
            "nine copies": ["-m", "benchmarks.masks", "--copy", "nine", "--directory", place],
            "one copy of everything": ["-m", "benchmarks.masks", "--copy", "once", "--directory", place],
        }  # fmt: skip
        found: dict[str, Cost] = {}
        for _ in range(options.again):
            for name, command in commands.items():
                shutil.rmtree(f"{place}/masks", ignore_errors=True)
                shutil.rmtree(f"{place}/copies", ignore_errors=True)
                forget_masks(Path(place))
                cost = measured(command)
                found[name] = min(cost, found.get(name, cost), key=lambda one: one.cpu)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    base = found["nine copies"]
    print(f"\n{tokens:,} tokens in {tokens // (ROWS * LENGTH)} parts\n")
    print(
        "| what | seconds | CPU seconds | ns of CPU a token | memory, MB | CPU / nine copies |\n|---|---|---|---|---|---|"
    )
    for name, cost in found.items():
        print(f"| {name} | {cost.wall:.1f} | {cost.cpu:.1f} | {1e9 * cost.cpu / tokens:.0f} | {cost.memory / 1e6:.0f} | "
              f"{cost.cpu / base.cpu:.2f} |")  # fmt: skip


def forget_masks(place: Path) -> None:
    """Let the manifest know of no mask."""
    manifest = json.loads((place / "run.json").read_text())
    manifest["stages"] = {name: one for name, one in manifest["stages"].items() if not name.startswith("mask/")}
    (place / "run.json").write_text(json.dumps(manifest))


if __name__ == "__main__":
    main()

"""A small run in many pieces, what it leaves behind, and real `alphatoken` processes on it."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.conftest import chat_row, save_model, write_rows

ROOT = Path(__file__).parents[2]
MANY_PIECES = [
    "data.validation=6", "anchor.fisher.prompts=20", "anchor.fisher.max_new_tokens=6", "anchor.warmup.steps=6",
    "anchor.warmup.examples=8", "anchor.warmup.batch_size=2", "anchor.snapshots=2", "valuation.layers=2",
    "valuation.window=4", "data.shard_examples=2", "valuation.tokens_per_batch=128", "cluster.cpus_per_worker=1",
    "cluster.inline_below=0",
]  # fmt: skip


def inputs_in(place: Path) -> list[str]:
    """A model and 60 rows below ``place``, and the settings that make many pieces of them."""
    train = write_rows(place / "train.jsonl", [chat_row(i) for i in range(60)])
    return [f"model.policy={save_model(place / 'policy', seed=1)}", f"data.train={train}", *MANY_PIECES]


def calm_run(place: Path, inputs: list[str]) -> dict[str, object]:
    """What an undisturbed run leaves in ``place``/run."""
    assert without_ray(0, 0, "run", f"run.dir={place}/run", *inputs)["status"] == 0
    return contents(place / "run")


def contents(run: Path) -> dict[str, object]:
    """File -> sha256, hidden ones as well, and the manifest without timings, number of workers and the run's own place.

    Without what tells how the run went: metrics.jsonl and the logs of its worker processes.
    """
    found: dict[str, object] = {}
    results = (p for p in run.rglob("*") if p.is_file() and p.name != "metrics.jsonl" and p.suffix != ".log")
    for file in sorted(results):
        found[str(file.relative_to(run))] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest = json.loads((run / "run.json").read_text())
    del manifest["configuration"]["run"]["dir"]
    manifest["configuration"].get("cluster", {}).pop("address", None)  # the same bytes wherever it runs
    for stage in manifest["stages"].values():
        del stage["seconds"], stage["finished"]
        for key in ("workers", "engine"):  # each worker looks at the rows that it is given
            stage["counts"].pop(key, None)
    found["run.json"] = manifest
    return found


def python(module: str, *arguments: object, **more: str) -> subprocess.Popen:
    """Start ``python -m module`` in a session of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)], env={**environment, **more}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def without_ray(kills: int, seed: int, *arguments: object) -> dict[str, int]:
    """See tests.faults.without_ray."""
    process = python("tests.faults.without_ray", kills, seed, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        own = psutil.Process(process.pid)
        return [own, *own.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def until(found, seconds: float, every: float = 0.1):
    """The first true value of ``found()``; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(every)
    raise AssertionError(f"nothing within {seconds} s")

"""Tokens per second beside bergson's token scores: `python -m benchmarks.bergson` (or `make bench-bergson`).

Both score the same rows of the embedded example along the same validation gradient, at the linear maps of the last
three layers, in float32 on two threads, batches of 2,048 tokens. bergson's command loads its model each time, which is
left out: its rate is that of the rows by which its larger set exceeds its smaller one, over the difference of the two
commands' times. The building of its query gradient is stated apart. The runs alternate: ours, small set, large set,
and so on; medians. bergson lives in an environment of its own under build/, beside the caller's torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from alphatoken import Directions, TokenValuer
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.contraction import Contraction, StackedDirections
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.directions import NAMES
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.positions import Positions
from alphatoken.pipeline.prepare.example import example_model
from alphatoken.pipeline.prepare.tokenize import Example
from benchmarks.example_batches import BUDGET, THREADS, batches_of, load_example
from benchmarks.speed import LAYERS, WINDOW, Cost, machine

ENVIRONMENT = Path("build/bergson")
REQUIREMENTS = (
    "bergson==2.5.*", "simple-parsing", "docstring-parser", "jaxtyping", "wadler-lindig", "ml_dtypes", "natsort", "scipy",
    "petname", "torchopt", "optree", "graphviz",
)  # fmt: skip
SMALL, LARGE = 2, 10


def installed() -> Path:
    """The `bergson` command of an environment that sees the caller's packages, made on first use."""
    command = ENVIRONMENT.resolve() / "bin" / "bergson"
    if command.exists():
        return command
    venv.create(ENVIRONMENT, with_pip=False)
    python = str(ENVIRONMENT / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *REQUIREMENTS], check=True)
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = subprocess.run([python, "-c", show], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    (Path(place) / "caller.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return command


def bergson(command: Path, task: str, out: Path, data: Path, lower: int, *options: str) -> Cost:
    """What one command takes, its start included. Raises RuntimeError with the end of its output."""
    left_out = ",".join(f"layers.{layer}.*" for layer in range(lower))
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    environment = os.environ | quiet | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS))
    arguments = [
        str(command), task, str(out), "--model", str(example_model()), "--dataset", str(data), "--projection_dim", "0",
        "--token_batch_size", str(BUDGET), "--filter_modules", left_out, "--overwrite", *options,
    ]  # fmt: skip
    before, started = os.times(), time.perf_counter()
    found = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if found.returncode:
        raise RuntimeError(f"bergson {task} failed: {found.stdout[-2000:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(time.perf_counter() - started, cpu)


def written_scores(out: Path) -> np.ndarray:
    """bergson's score of every position but the last, row after row."""
    info = json.loads((out / "info.json").read_text())
    kind = info["dtype"]
    layout = np.dtype({key: kind[key] for key in ("names", "formats", "offsets", "itemsize")})
    scores = np.memmap(out / "scores.bin", dtype=layout, mode="r", shape=(info["num_rows"],))
    assert scores["written_0"].all()
    return np.asarray(scores["score_0"], np.float64)


def gradient(model: torch.nn.Module, validation: list[Example]) -> dict[str, torch.Tensor]:
    """Sum over validation response positions of d h^T."""
    total = OuterSum(scored_layers(model, LAYERS))
    for batch in batches_of(validation):
        total.positions = batch.predicting()
        ghost_pass(scored_layers(model, LAYERS), batch, total)
    return total.total


def one_direction(model: torch.nn.Module, direction: dict[str, torch.Tensor]) -> Callable[[Batch], torch.Tensor]:
    """What bergson computes, d' G h along one direction and no causal path, at the positions that predict a response token."""
    scored = scored_layers(model, LAYERS)
    stacked, dtype = StackedDirections(scored, {"adaptation": direction}, set()), scored.maps[0].parameter.dtype

    def work(batch: Batch) -> torch.Tensor:
        contraction = Contraction(stacked, {}, Positions(batch.predicting(), batch.shape), dtype)
        ghost_pass(scored, batch, contraction)
        return contraction.direct[0]

    return work


def cost_of(work: Callable[[], object]) -> Cost:
    """What a call takes."""
    started = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - started[0], time.process_time() - started[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    command = installed()
    model, examples = load_example()
    validation, rows = examples[:2], examples[32 : 32 + LARGE]
    lower = len(scored_layers(model, LAYERS).lower)
    adaptation = gradient(model, validation)
    same = one_direction(model, adaptation)
    paper = TokenValuer(
        model, Directions(dict.fromkeys(NAMES, adaptation)), LAYERS, WINDOW, scores=["paper", "loss"]
    ).value
    every = TokenValuer(model, Directions(dict.fromkeys(NAMES, adaptation)), LAYERS, WINDOW).value
    batches, tokens = batches_of(rows), sum(len(e.input_ids) for e in rows)
    extra = sum(len(e.input_ids) for e in rows[SMALL:])
    place = Path(tempfile.mkdtemp(prefix="bergson-"))
    try:
        for name, part in (("validation", validation), ("small", rows[:SMALL]), ("large", rows)):
            lists = {"input_ids": [list(e.input_ids) for e in part], "labels": [list(e.labels) for e in part]}
            Dataset.from_dict(lists).save_to_disk(place / name)
        query = place / "query"
        build = ("--aggregation", "mean", "--precision", "fp32")
        built = bergson(command, "build", query, place / "validation", lower, *build)
        score = ("--query_path", str(query), "--attribute_tokens", "--index_cfg.precision", "fp32")
        ours_in_turn: dict[str, Callable[[Batch], object]] = {"same": same, "paper": paper, "every": every}
        for work in ours_in_turn.values():
            work(batches[-1])
        costs: dict[str, list[Cost]] = {name: [] for name in (*ours_in_turn, "small", "large")}
        for _ in range(options.repeats):
            for name, work in ours_in_turn.items():
                costs[name].append(cost_of(lambda work=work: [work(b) for b in batches]))
            for name in ("small", "large"):
                costs[name].append(bergson(command, "score", place / f"scores-{name}", place / name, lower, *score))
        theirs = written_scores(place / "scores-large")
    finally:
        shutil.rmtree(place)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i))
    by_row = dict(zip(order, map(same, batches_of(rows, 1)), strict=True))
    ours = np.concatenate([by_row[i].numpy() for i in range(len(rows))])
    assert len(theirs) == sum(len(e.input_ids) - 1 for e in rows)  # every position but the last, prompts as well
    inside = np.concatenate([np.array(e.labels[1:]) != -100 for e in rows])
    agreement = np.corrcoef(ours, theirs[inside])[0, 1]
    wall = {name: statistics.median(c.wall for c in found) for name, found in costs.items()}
    cpu = {name: statistics.median(c.cpu for c in found) for name, found in costs.items()}
    peer, peer_cpu = (extra / (taken["large"] - taken["small"]) for taken in (wall, cpu))
    print(f"Machine: {machine()}\n")
    print(
        f"| SmolLM2-135M, float32, last {LAYERS} layers, {tokens:,} tokens in {len(rows)} rows | tokens/s | times bergson | in CPU time |"
    )
    print("|---|---|---|---|")
    print(
        f"| bergson 2.5 `score --attribute_tokens`: one gradient, d^T G h at every position | {peer:,.0f} | 1.0 | 1.0 |"
    )
    works = {
        "same": "the same from us at response positions: one direction, no causal path",
        "paper": "the paper's columns and the loss: two directions, direct and causal",
        "every": "every column",
    }
    for name, what in works.items():
        rate = tokens / wall[name]
        print(f"| {what} | {rate:,.0f} | {rate / peer:.1f} | {tokens / cpu[name] / peer_cpu:.1f} |")
    print(
        f"\nCorrelation of the two packages' scores over {len(ours):,} response tokens: {agreement:.6f} (theirs is a mean over rows: "
        f"another scale). bergson's rate is that of {extra:,} tokens, {wall['large']:.1f} s - {wall['small']:.1f} s; its query "
        f"gradient, not counted, took {built.wall:.1f} s with its start. Repeats: {options.repeats}, in turn; medians."
    )


if __name__ == "__main__":
    main()

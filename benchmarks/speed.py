"""What a token costs: `python -m benchmarks.speed` (or `make bench`) prints the tables of the README.

Every ratio is taken within one run, pass by pass in turn, so that it survives a noisy machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.example_batches import THREADS, batches_of, load_example
from benchmarks.pairwise_way import PairwiseWay
from pipeline import Directions, TokenValuer
from pipeline.maths.batch import Batch
from pipeline.maths.decoder import scored_layers

LAYERS, WINDOW = 3, 32


def directions_of(model: torch.nn.Module) -> Directions:
    """Random directions: a contraction costs the same whatever they hold."""
    weights = scored_layers(model, LAYERS).weights()
    torch.manual_seed(0)
    return Directions({n: {k: torch.randn_like(w) for k, w in weights.items()} for n in ("adaptation", "stability")})


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def forward(model: torch.nn.Module, batch: Batch) -> None:
    """A plain forward pass with logits at every position, as training or generation would run it."""
    with torch.no_grad():
        model(input_ids=batch.input_ids, use_cache=False)


def in_turn(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Run every work once uncounted, then ``repeats`` times in turn; seconds per run."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            seconds[name].append(timed(work))
    return seconds


def floor(model: torch.nn.Module, batches: list[Batch]) -> float:
    """FLOPs of valuation at its least over those of a forward pass with all logits, from the shapes alone.

    Lower and scored layers forward 2P; head forward and backward at the r response positions; activations backward
    through the scored layers 2P_K; contractions of two directions 4P_K at the r response positions.
    """
    scored = scored_layers(model, LAYERS)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    head = model.get_output_embeddings().weight.numel()
    body = matrices - (0 if model.config.tie_word_embeddings else head)
    response = sum(len(b.predicting()) for b in batches) / sum(int(b.lengths.sum()) for b in batches)
    ours = 2 * body + 4 * head * response + 2 * scored.coverage.scored + 4 * scored.coverage.scored * response
    return ours / (2 * body + 2 * head)


def speed_table(repeats: int) -> None:
    """Value stage against plain forward passes over the same batches."""
    model, examples = load_example()
    batches = batches_of(examples[:32])
    tokens = sum(int(b.lengths.sum()) for b in batches)
    valuer = TokenValuer(model, directions_of(model), LAYERS, WINDOW)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = in_turn(
        {
            "forward": lambda: [forward(model, b) for b in batches],
            "value": lambda: [valuer.value(b) for b in batches],
        },
        repeats,
    )
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ratio = statistics.median(v / f for v, f in zip(seconds["value"], seconds["forward"], strict=True))
    response = sum(len(b.predicting()) for b in batches) / tokens
    print("\n| SmolLM2-135M, float32, K=3, W=32, two directions | tokens/s | ratio to forward |")
    print("|---|---|---|")
    print(f"| plain forward, logits at every position | {tokens / statistics.median(seconds['forward']):,.0f} | 1.00 |")
    print(f"| value stage | {tokens / statistics.median(seconds['value']):,.0f} | {ratio:.2f} |")
    print(f"| floor, from FLOPs ({response:.0%} response tokens) | | {floor(model, batches):.2f} |")
    print(f"\nPeak memory {after / 1024:,.0f} MB ({before / 1024:,.0f} MB with model and directions loaded).")


def pairwise_table(validation: int, train: int) -> None:
    """Value stage against the paper's pairwise way on the same rows."""
    model, examples = load_example()
    held, rows = (
        examples[:validation],
        sorted(examples[validation : validation + train], key=lambda e: len(e.input_ids)),
    )
    tokens = sum(len(e.input_ids) for e in rows)
    batches = batches_of(rows)
    valuer = TokenValuer(model, directions_of(model), LAYERS, WINDOW)
    ours = statistics.median(in_turn({"value": lambda: [valuer.value(b) for b in batches]}, 3)["value"])
    print(f"\n| {validation} validation examples, {train} rows, {tokens:,} tokens | tokens/s | time of ours |")
    print("|---|---|---|")
    print(f"| value stage (both directions) | {tokens / ours:,.0f} | 1.0 |")
    longest = max(len(e.input_ids) for e in rows + held)
    for title, length in (("padded to the longest row", longest), ("padded to 2,048", 2048)):
        way = PairwiseWay(model, held, LAYERS, WINDOW, longest)
        way.length = length
        few = rows if length == longest else rows[-2:]
        taken = timed(lambda w=way, f=few: [w([e]) for e in f])  # type: ignore[misc]
        rate = sum(len(e.input_ids) for e in few) / taken
        print(f"| the paper's way, adaptation only, {title} | {rate:,.0f} | {tokens / ours / rate:.1f} |")


def memory_row(length: int) -> None:
    """Peak memory of one sequence beyond the loaded model; run in a process of its own."""
    model, _ = load_example()
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    valuer = TokenValuer(model, directions_of(model), LAYERS, WINDOW)
    valuer.value(Batch(ids[:, :64], labels[:, -64:], torch.tensor([64])))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    valuer.value(Batch(ids, labels, torch.tensor([length])))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"| {length:,} | {(after - before) / 1024:,.0f} | {(after - before) / length:,.0f} |")


def memory_table(lengths: list[int]) -> None:
    """Peak memory against sequence length."""
    print("\n| tokens in one sequence | peak beyond the model, MB | KB per token |\n|---|---|---|", flush=True)
    for length in lengths:
        subprocess.run([sys.executable, "-m", "benchmarks.speed", "--memory-row", str(length)], check=True)


def machine() -> str:
    """The machine, in a line."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {THREADS} threads, torch {torch.__version__}"


def main() -> None:
    """Print the tables asked for; all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["speed", "pairwise", "memory"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-row", type=int)
    options = parser.parse_args()
    if options.memory_row:
        memory_row(options.memory_row)
        return
    print(f"Machine: {machine()}")
    if options.only in (None, "speed"):
        speed_table(options.repeats)
    if options.only in (None, "pairwise"):
        pairwise_table(validation=32, train=12)
    if options.only in (None, "memory"):
        memory_table([512, 1024, 2048, 4096, 8192])


if __name__ == "__main__":
    main()

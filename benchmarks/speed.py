"""What a token costs: `python -m benchmarks.speed` (or `make bench`) prints the table of docs/cost.md.

Every ratio is taken within one run, batch by batch in turn, so that it survives a noisy machine; tokens are real ones,
without padding. `--only speed snapshots exact pairwise memory` picks parts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alphatoken import Directions, TokenValuer
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.costs import model_costs, value_floor
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.valuer import ALL
from benchmarks.example_batches import THREADS, batches_of, load_example
from benchmarks.pairwise_way import PairwiseWay

LAYERS, WINDOW = 3, 32
PARTS = ("speed", "snapshots", "exact", "pairwise", "memory")
LENGTHS = (512, 1024, 2048, 4096, 8192)


def directions_of(model: torch.nn.Module) -> Directions:
    """Random directions: a contraction costs the same whatever they hold."""
    weights = scored_layers(model, LAYERS).weights()
    torch.manual_seed(0)
    return Directions({n: {k: torch.randn_like(w) for k, w in weights.items()} for n in ("adaptation", "stability")})


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one work over all batches: medians over the repeats, added up."""

    wall: float
    cpu: float


def in_turn(works: dict[str, Callable[[Batch], object]], batches: list[Batch], repeats: int) -> dict[str, Cost]:
    """Every work on every batch, in turn: once uncounted on the last batch, then ``repeats`` times on each."""
    for work in works.values():
        work(batches[-1])
    wall: dict[str, float] = dict.fromkeys(works, 0.0)
    cpu: dict[str, float] = dict.fromkeys(works, 0.0)
    for batch in batches:
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(repeats):
            for name, work in works.items():
                started = time.perf_counter(), time.process_time()
                work(batch)
                seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
        for name, found in seconds.items():
            wall[name] += statistics.median(w for w, _ in found)
            cpu[name] += statistics.median(c for _, c in found)
    return {name: Cost(wall[name], cpu[name]) for name in works}


def forward(model: torch.nn.Module, batch: Batch) -> None:
    """A plain forward pass with logits at every position, as training or generation would run it."""
    with torch.no_grad():
        model(input_ids=batch.input_ids, use_cache=False)


def real_tokens(batches: list[Batch]) -> int:
    """Tokens without padding."""
    return sum(int(b.lengths.sum()) for b in batches)


def resident(key: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def forget_peak() -> None:
    """Give freed memory back to the system, and let the peak start again from what is resident then."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def row(what: str, rate: float | None, ratio: str, note: str = "") -> None:
    """One row of the table."""
    print(f"| {what} | {'' if rate is None else f'{rate:,.0f}'} | {ratio} | {note} |", flush=True)


def flops(model: torch.nn.Module, batches: list[Batch], scores: Sequence[str]) -> tuple[float, float]:
    """FLOPs per token of a plain forward pass, and of valuation at its least, from the shapes alone.

    Forward: 2P in the layers and 2 * head at every position. Valuation: see ``value_floor``.
    """
    costs, _ = model_costs(model, LAYERS)
    tokens = real_tokens(batches)
    least = value_floor(costs, tokens, sum(len(b.predicting()) for b in batches), scores)
    return 2 * (costs.lower + costs.scored + costs.head), least / tokens


def speed_rows(repeats: int) -> None:
    """Value stage against plain forward passes over the same batches: every column, and the scores by themselves."""
    model, examples = load_example()
    batches = batches_of(examples[:32])[::2]
    tokens, response = real_tokens(batches), sum(len(b.predicting()) for b in batches)
    directions = directions_of(model)
    wanted = {"every column": ALL, "paper": ("paper", "loss"), "information": ("information", "loss")}
    wanted["entropy"] = ("entropy", "loss")
    valuers = {name: TokenValuer(model, directions, LAYERS, WINDOW, scores=scores) for name, scores in wanted.items()}
    works = {"forward": lambda b: forward(model, b), **{name: valuer.value for name, valuer in valuers.items()}}
    cost = in_turn(works, batches, repeats)
    plain = cost["forward"]
    each, _ = flops(model, batches, ALL)
    of = f"{tokens:,} tokens in {len(batches)} batches, {response / tokens:.0%} response"
    row(
        "plain forward, logits at every position",
        tokens / plain.wall,
        "1.00",
        f"{each / 1e6:,.0f} MFLOP per token; {of}",
    )
    for name, scores in wanted.items():
        ours, least = cost[name], flops(model, batches, scores)[1]
        lowest = least / each
        title = "value stage, every column" if scores is ALL else f"value stage, {name} and loss alone"
        note = f"{ours.cpu / plain.cpu:.2f} in CPU time; floor {least / 1e6:,.0f} MFLOP per token = {lowest:.2f}"
        above = ours.wall / plain.wall / lowest
        row(title, tokens / ours.wall, f"{ours.wall / plain.wall:.2f}", f"{note}, at {above:.2f} of it")
    apart = [cost[name] for name in ("paper", "information", "entropy")]
    wall, cpu = sum(c.wall for c in apart), sum(c.cpu for c in apart)
    ratio = cost["every column"].wall / wall
    row("every column, against the last three rows together", None, f"{ratio:.2f}",
        f"{cost['every column'].cpu / cpu:.2f} in CPU time")  # fmt: skip
    forget_peak()
    before = resident("VmRSS")
    for batch in batches:
        valuers["every column"].value(batch)
    peak = resident("VmHWM")
    row(
        "peak memory of the value stage, every column",
        None,
        "",
        f"{peak:,.0f} MB, of which {before:,.0f} before: libraries, model, directions of four valuers",
    )


def snapshot_rows(repeats: int) -> None:
    """Several snapshots over one pass of the lower layers, as the value stage takes them."""
    model, examples = load_example()
    batches = batches_of(examples[:32])[3:4]
    one = directions_of(model)
    own = {n: w.clone() for n, w in scored_layers(model, LAYERS).weights().items()}
    valuers = [TokenValuer(model, Directions(one.named, own), LAYERS, WINDOW) for _ in range(5)]

    def together(batch: Batch, count: int) -> None:
        with lower_layers_once(valuers[0].scored):
            for valuer in valuers[:count]:
                valuer.value(batch)

    counts = (1, 3, 5)
    works = {str(c): (lambda b, c=c: together(b, c)) for c in counts}  # type: ignore[misc]  # mypy infers no type of a lambda with a default
    cost = in_turn(works, batches, repeats)
    for name, found in cost.items():
        ratio, cpu = found.wall / cost["1"].wall, found.cpu / cost["1"].cpu
        row(
            f"anchor.snapshots={name}",
            real_tokens(batches) / found.wall,
            f"{ratio:.2f} of one snapshot",
            f"{cpu:.2f} in CPU time",
        )


def exact_rows(repeats: int) -> None:
    """The exact columns on top; a direction of zeros, as without a drift, costs them no pass."""
    model, examples = load_example()
    batches = batches_of(examples[:32])[3:4]
    both = directions_of(model).named
    zeros = {n: torch.zeros_like(t) for n, t in both["stability"].items()}
    still = Directions({"adaptation": both["adaptation"], "stability": zeros})
    valuers = {
        "every column": TokenValuer(model, Directions(both), LAYERS, WINDOW),
        "and valuation.exact=true": TokenValuer(model, Directions(both), LAYERS, WINDOW, exact=True),
        "and valuation.exact=true, anchor.drift=none": TokenValuer(model, still, LAYERS, WINDOW, exact=True),
    }
    cost = in_turn({name: valuer.value for name, valuer in valuers.items()}, batches, repeats)
    for name, found in cost.items():
        ratio, cpu = found.wall / cost["every column"].wall, found.cpu / cost["every column"].cpu
        row(name, real_tokens(batches) / found.wall, f"{ratio:.2f} of every column", f"{cpu:.2f} in CPU time")


def pairwise_rows(validation: int, train: int) -> None:
    """Value stage against the paper's pairwise way on the same rows; what a row costs there does not depend on others."""
    model, examples = load_example()
    held, rows = examples[:validation], examples[validation : validation + train]
    tokens, batches = sum(len(e.input_ids) for e in rows), batches_of(rows)
    valuer = TokenValuer(model, directions_of(model), LAYERS, WINDOW)
    ours = in_turn({"value": valuer.value}, batches, 3)["value"]
    row(f"value stage, every column, {train} rows", tokens / ours.wall, "1.0", f"{tokens:,} tokens")
    way = PairwiseWay(model, held, LAYERS, WINDOW)
    pairs = sum(label != -100 for e in held for label in e.labels)
    for length in (max(len(e.input_ids) for e in held + rows), 2048):
        started = time.perf_counter(), time.process_time()
        for example in rows:
            way([example], length)
        wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        what = f"the paper's way, {validation} validation examples, rows padded to {length:,}"
        note = f"adaptation alone, {pairs:,} validation tokens, whose own passes are not counted"
        row(what, tokens / wall, f"{wall / ours.wall:.1f} times ours", f"{cpu / ours.cpu:.1f} in CPU time; {note}")


def memory_of(length: int, scores: Sequence[str] = ALL) -> float:
    """Peak memory in MB of one sequence, half of it response, beyond what was resident before."""
    model, _ = load_example()
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    valuer = TokenValuer(model, directions_of(model), LAYERS, WINDOW, scores=scores)
    valuer.value(Batch(ids[:, :64], labels[:, -64:], torch.tensor([64])))
    forget_peak()
    before = resident("VmRSS")
    valuer.value(Batch(ids, labels, torch.tensor([length])))
    return resident("VmHWM") - before


def memory_rows() -> None:
    """Peak memory against sequence length, each in a process of its own."""
    last: float | None = None
    for length in LENGTHS:
        command = [sys.executable, "-m", "benchmarks.speed", "--memory-of", str(length)]
        found = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        more = "" if last is None else f"{found - last:+,.0f} MB for {length - length // 2:,} tokens more"
        row(
            f"one sequence of {length:,} tokens",
            None,
            "",
            f"peak {found:,.0f} MB beyond the model; {more}".rstrip("; "),
        )
        last = found


def machine() -> str:
    """The machine, in a line."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {THREADS} threads, torch {torch.__version__}"


def main() -> None:
    """Print the rows asked for; all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", type=int, help="a sequence length: what each row of memory runs")
    parser.add_argument("--scores", nargs="+", default=ALL, help="with --memory-of; default: every column")
    options = parser.parse_args()
    if options.memory_of:
        print(memory_of(options.memory_of, options.scores))
        return
    print(f"Machine: {machine()}\n")
    print(f"| SmolLM2-135M, float32, K={LAYERS}, W={WINDOW} | tokens/s | ratio | |\n|---|---|---|---|", flush=True)
    if "speed" in options.only:
        speed_rows(options.repeats)
    if "snapshots" in options.only:
        snapshot_rows(3)
    if "exact" in options.only:
        exact_rows(3)
    if "pairwise" in options.only:
        pairwise_rows(validation=32, train=3)
    if "memory" in options.only:
        memory_rows()


if __name__ == "__main__":
    main()

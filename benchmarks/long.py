"""Long rows: `python -m benchmarks.long` prints time and memory of one row of 2,048, 8,192 and 32,768 tokens.

Each length in a process of its own: peaks are the process's. The row is the code problems one after another, real tokens
without padding, with the labels of their responses. The plain forward pass has logits at every position, 512 positions at
a time, since those of 32,768 tokens at once are 6.4 GB. The embedded model was trained on up to 8,192 positions; rotary
positions are computed for any, and what a longer row says does not matter here.

`--lengths 2048 8192` picks lengths, `--repeats 3` takes medians. `--model-layers 4` leaves the first 26 of the 30 layers out:
a seventh of the time and the same peak, since lower layers run one after another and keep nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from alphatoken import TokenValuer
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.costs import forward_flops, meta_model, model_costs, shapes_of, value_flops, value_memory
from alphatoken.pipeline.maths.model_source import ModelSource, load_config
from alphatoken.pipeline.maths.valuer import ALL
from alphatoken.pipeline.prepare.example import example_model
from benchmarks.example_batches import load_example
from benchmarks.speed import LAYERS, WINDOW, directions_of, forget_peak, machine, resident

LENGTHS = (2048, 8192, 32768)
POSITIONS_AT_ONCE = 512  # of logits


def long_row(length: int, layers: int | None) -> tuple[torch.nn.Module, Batch]:
    """The embedded model, of which the last ``layers`` are kept (None: all), and one row of ``length`` tokens: (1, length)."""
    model, examples = load_example()
    if layers is not None:
        model.model.layers = model.model.layers[-layers:]
        model.config.num_hidden_layers = layers
    # Of its own and not of the mapped file, whose pages come and go as the system likes.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    ids = [token for example in examples for token in example.input_ids]
    labels = [label for example in examples for label in example.labels]
    repeats = -(-length // len(ids))
    ids, labels = (ids * repeats)[:length], (labels * repeats)[:length]
    return model, Batch(torch.tensor([ids]), torch.tensor([labels]), torch.tensor([length]))


def plain_forward(model: torch.nn.Module, batch: Batch) -> None:
    """Logits at every position, as training or generation would have them, a slice at a time."""
    with torch.no_grad():
        hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state[0]  # type: ignore[operator, union-attr]  # an nn.Module to mypy
        for start in range(0, len(hidden), POSITIONS_AT_ONCE):
            model.lm_head(hidden[start : start + POSITIONS_AT_ONCE])  # type: ignore[operator]  # as above


@dataclass(frozen=True, slots=True)
class Spent:
    """Median seconds of a work, by the clock and of the CPU; its peak in MB beyond what was resident before."""

    wall: float
    cpu: float
    peak: float


def spent(work: Callable[[], object], repeats: int) -> Spent:
    """Do it ``repeats`` times."""
    forget_peak()
    before, wall, cpu = resident("VmRSS"), [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    return Spent(statistics.median(wall), statistics.median(cpu), resident("VmHWM") - before)


def measured(length: int, repeats: int, layers: int | None) -> dict[str, float]:
    """What one row costs; ``value_peak``, ``forward_peak`` in MB beyond model and directions."""
    model, batch = long_row(length, layers)
    valuer = TokenValuer(model, directions_of(model), LAYERS, WINDOW)
    small = batch.rows(slice(0, 1))
    small = Batch(small.input_ids[:, :512], small.labels[:, :512], torch.tensor([512]))
    plain_forward(model, small)
    valuer.value(small)  # threads, kernels and pools are made on first use
    value = spent(lambda: valuer.value(batch), repeats)
    forward = spent(lambda: plain_forward(model, batch), repeats)
    costs, _ = model_costs(model, LAYERS)
    shapes = shapes_of([batch.shape], len(batch.predicting()))
    plain = forward_flops(costs, shapes) + 2 * costs.head * length
    return {
        "response": len(batch.predicting()), "forward": forward.wall, "value": value.wall, "forward_peak": forward.peak,
        "value_peak": value.peak, "planned": value_flops(costs, shapes, WINDOW, scores=ALL) / plain,
        "cpu": value.cpu / forward.cpu,
    }  # fmt: skip


def planned_rows(lengths: Sequence[int]) -> None:
    """What the plan says of each length, from the shapes alone; half of the row is response."""
    costs, _ = model_costs(meta_model(load_config(ModelSource(str(example_model(print)))), torch.float32), LAYERS)
    print(
        "| tokens in one row | forward, FLOPs | value / forward | memory beyond the weights and directions, MB |\n|---|---|---|---|"
    )
    for length in lengths:
        shapes = shapes_of([(1, length)], length // 2)
        plain = forward_flops(costs, shapes) + 2 * costs.head * length
        memory = value_memory(costs, length, length, 4, 1, False)
        beyond = memory["activations"] + memory["logits"]
        ratio = value_flops(costs, shapes, WINDOW, scores=ALL) / plain
        print(f"| {length:,} | {plain:.2e} | {ratio:.2f} | {beyond / 1e6:,.0f} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--model-layers", type=int, help="keep so many of the model's layers, the last ones")
    parser.add_argument("--planned", action="store_true", help="what the plan says of the lengths, without running any")
    parser.add_argument("--one", type=int, help="a length: what each row of the table runs")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one, options.repeats, options.model_layers)))
        return
    if options.planned:
        return planned_rows(options.lengths)
    print(f"Machine: {machine()}\n")
    print(
        "| tokens in one row | response | forward, s | value, every column, s | value / forward (in CPU time, planned) | "
        "peak of value, MB | KB per token | peak of forward, MB |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for length in options.lengths:
        command = [sys.executable, "-m", "benchmarks.long", "--one", str(length), "--repeats", str(options.repeats)]
        if options.model_layers:
            command += ["--model-layers", str(options.model_layers)]
        found = json.loads(
            subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ).stdout.splitlines()[-1]
        )
        ratio = f"{found['value'] / found['forward']:.2f} ({found['cpu']:.2f}, {found['planned']:.2f})"
        print(
            f"| {length:,} | {found['response']:,} | {found['forward']:.1f} | {found['value']:.1f} | {ratio} | "
            f"{found['value_peak']:,.0f} | {found['value_peak'] * 1024 / length:.0f} | {found['forward_peak']:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""What the unrolled direction costs: `python -m benchmarks.unroll` prints rows for docs/cost.md.

The sweep back against the forward half on the same steps, in turn, with two objectives; the peak memory of
each half in a process of its own, the tape being on disk in a run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch

from alphatoken.pipeline.maths.batch import Batch, Sequences, by_token_budget
from alphatoken.pipeline.maths.decoder import ScoredLayers, scored_layers
from alphatoken.pipeline.maths.simulated import Descent, SimulatedRun, Taped, simulate
from alphatoken.pipeline.maths.unroll import Adjoint, sweep
from benchmarks.example_batches import THREADS, load_example
from benchmarks.speed import LAYERS, Cost, forget_peak, in_turn, machine, real_tokens, resident, row

TOKENS_PER_PASS = 4096
OBJECTIVES = ("adaptation", "stability")


class Steps:
    """Steps of some rows each; each is taken by itself, at the untouched weights."""

    def __init__(self, steps: int, size: int) -> None:
        self.model, examples = load_example()
        self.scored: ScoredLayers = scored_layers(self.model, LAYERS)
        self.descent = Descent("adam", 1e-4, steps)
        self.batches: list[list[Batch]] = []
        for step in range(steps):
            rows = examples[step * size : (step + 1) * size]
            some = Sequences([e.id for e in rows], [list(e.input_ids) for e in rows], [list(e.labels) for e in rows])
            groups = by_token_budget([len(ids) for ids in some.input_ids], TOKENS_PER_PASS)
            self.batches.append([some.take(group).batch() for group in groups])
        self.weights = self.scored.weights()

    def forward(self, step: int) -> Taped:
        """One step of the forward half."""
        kept: dict[int, Taped] = {}
        run = SimulatedRun(self.weights, self.descent)
        simulate(self.scored, run, [self.batches[step]], "sdpa", kept.__setitem__)
        return kept[0]

    def back(self, step: int, taped: Taped, objectives: int) -> None:
        """The same step of the sweep; what the adjoints hold does not matter to its cost."""
        adjoints = {name: Adjoint.at_the_end(self.weights) for name in OBJECTIVES[:objectives]}
        sweep(self.scored, self.descent, [self.batches[step]], lambda t: taped, adjoints, "sdpa", lambda t, s: None)


def cost_rows(steps: int, size: int, repeats: int) -> None:
    """Forward half and sweep, step by step in turn."""
    own = Steps(steps, size)
    taped = own.forward(0)
    works: dict[str, Callable[[int], object]] = {
        "forward half": own.forward,
        "sweep, two objectives": lambda step: own.back(step, taped, 2),
    }
    cost: dict[str, Cost] = in_turn(works, list(range(steps)), repeats)  # type: ignore[arg-type]  # steps for batches
    tokens, first = real_tokens([batch for step in own.batches for batch in step]), cost["forward half"]
    for name, found in cost.items():
        ratio, cpu = found.wall / first.wall, found.cpu / first.cpu
        row(f"unrolled: {name}", tokens / found.wall, f"{ratio:.2f} of the forward half", f"{cpu:.2f} in CPU time")


def memory_of(half: str, size: int) -> float:
    """Peak memory in MB of one half over one step, beyond what was resident before."""
    own = Steps(2, size)
    taped = own.forward(1)
    forget_peak()
    before = resident("VmRSS")
    if half == "forward":
        own.forward(0)
    else:
        own.back(0, taped, 2)
    return resident("VmHWM") - before


def memory_rows(size: int) -> None:
    """Peak memory of both halves, each in a process of its own."""
    found = {}
    for half in ("forward", "sweep"):
        command = [sys.executable, "-m", "benchmarks.unroll", "--rows", str(size), "--memory-of", half]
        found[half] = float(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        ratio = found[half] / found["forward"]
        note = f"{found[half]:,.0f} MB beyond the model"
        row(f"unrolled: peak memory, {half}", None, f"{ratio:.2f} of the forward half", note)


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps that are measured")
    parser.add_argument("--rows", type=int, default=8, help="rows of each step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-of", choices=("forward", "sweep"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    if asked.memory_of:
        print(memory_of(asked.memory_of, asked.rows))
        return
    print(f"{machine()}; SmolLM2-135M-Instruct, K={LAYERS}, steps of {asked.rows} rows\n")
    print("| what | tokens per second | ratio | |\n|---|---|---|---|")
    cost_rows(asked.steps, asked.rows, asked.repeats)
    memory_rows(asked.rows)


if __name__ == "__main__":
    main()

"""What the unrolled direction costs: `python -m benchmarks.unroll` prints rows for docs/cost.md.

The sweep back against the forward half on the same steps, in turn, with two objectives and with one; the peak memory of
each half in a process of its own, the tape being on disk in a run. `--layers all` for a run of all layers, `--train weights lora`
for one of adapters beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from alphatoken.pipeline.anchor.unrolled import learner_of
from alphatoken.pipeline.maths.adapters import all_layers
from alphatoken.pipeline.maths.batch import Batch, Sequences, by_token_budget
from alphatoken.pipeline.maths.decoder import ScoredLayers, scored_layers
from alphatoken.pipeline.maths.learners import Trained
from alphatoken.pipeline.maths.simulated import Descent, SimulatedRun, Taped, simulate
from alphatoken.pipeline.maths.unroll import Adjoint, sweep
from alphatoken.pipeline.settings.unroll import TRAINED, UnrollSettings
from benchmarks.example_batches import THREADS, load_example
from benchmarks.speed import LAYERS, Cost, forget_peak, in_turn, machine, real_tokens, resident, row

TOKENS_PER_PASS = 4096
OBJECTIVES = ("adaptation", "stability")


class Steps:
    """Steps of some rows each; each is taken by itself, at the untouched weights."""

    def __init__(self, steps: int, size: int, layers: str, dtype: str) -> None:
        self.model, examples = load_example()
        self.model.to(getattr(torch, dtype))
        self.scored: ScoredLayers = (
            all_layers(self.model) if layers == "all" else scored_layers(self.model, int(layers))
        )
        self.descent = Descent("adam", 1e-4, steps)
        self.batches: list[list[Batch]] = []
        for step in range(steps):
            rows = examples[step * size : (step + 1) * size]
            some = Sequences([e.id for e in rows], [list(e.input_ids) for e in rows], [list(e.labels) for e in rows])
            groups = by_token_budget([len(ids) for ids in some.input_ids], TOKENS_PER_PASS)
            self.batches.append([some.take(group).batch() for group in groups])

    def forward(self, learner: Trained, step: int) -> Taped:
        """One step of the forward half."""
        kept: dict[int, Taped] = {}
        run = SimulatedRun(learner.start(), self.descent)
        simulate(learner, run, [self.batches[step]], "sdpa", kept.__setitem__)
        return kept[0]

    def back(self, learner: Trained, taped: Taped, objectives: int, step: int) -> None:
        """The same step of the sweep; what the adjoints hold does not matter to its cost."""
        adjoints = {name: Adjoint.at_the_end(learner.start()) for name in OBJECTIVES[:objectives]}
        sweep(learner, self.descent, [self.batches[step]], lambda t: taped, adjoints, lambda t, s: None)

    def learner(self, train: str) -> Trained:
        """As a run makes it."""
        return learner_of(self.scored, UnrollSettings(train=train), seed=0)


def cost_rows(own: Steps, trained: Sequence[str], repeats: int) -> None:
    """Forward half and sweep, step by step in turn, of everything that may learn."""
    works: dict[str, Callable[[int], object]] = {}
    for train in trained:
        learner = own.learner(train)
        taped = own.forward(learner, 0)
        works[f"{train}, forward half"] = partial(own.forward, learner)
        for count in (1, 2):
            works[f"{train}, sweep, {count} objective(s)"] = partial(own.back, learner, taped, count)
    steps = list(range(len(own.batches)))
    cost: dict[str, Cost] = in_turn(works, steps, repeats)  # type: ignore[arg-type]  # steps for batches
    tokens = real_tokens([batch for step in own.batches for batch in step])
    first = cost[f"{trained[0]}, forward half"]
    for name, found in cost.items():
        own_half = cost[f"{name.partition(',')[0]}, forward half"]
        row(
            f"unrolled: {name}", tokens / found.wall, f"{found.wall / own_half.wall:.2f} of the forward half",
            f"{found.cpu / own_half.cpu:.2f} in CPU time; {found.cpu / first.cpu:.2f} of the first row",
        )  # fmt: skip


def memory_of(own: Steps, train: str, half: str) -> float:
    """Peak memory in MB of one half over one step, beyond what was resident before."""
    taped = own.forward(own.learner(train), 1)
    forget_peak()
    before = resident("VmRSS")
    if half == "forward":
        own.forward(own.learner(train), 0)
    else:
        own.back(own.learner(train), taped, 2, 0)
    return resident("VmHWM") - before


def memory_rows(asked: argparse.Namespace) -> None:
    """Peak memory of both halves, each in a process of its own."""
    given = ["--rows", str(asked.rows), "--layers", asked.layers, "--dtype", asked.dtype]
    for train in asked.train:
        found = {}
        for half in ("forward", "sweep"):
            command = [sys.executable, "-m", "benchmarks.unroll", *given, "--train", train, "--memory-of", half]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[half] = float(done.stdout.splitlines()[-1])
            ratio = found[half] / found["forward"]
            note = f"{found[half]:,.0f} MB beyond the model"
            row(f"unrolled: {train}, peak memory, {half}", None, f"{ratio:.2f} of the forward half", note)


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps that are measured")
    parser.add_argument("--rows", type=int, default=8, help="rows of each step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", default=str(LAYERS), help="that learn, from the last, or all")
    parser.add_argument("--train", nargs="+", choices=TRAINED, default=["weights"], help="what learns")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--memory-of", choices=("forward", "sweep"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    own = Steps(2 if asked.memory_of else asked.steps, asked.rows, asked.layers, asked.dtype)
    if asked.memory_of:
        print(memory_of(own, asked.train[0], asked.memory_of))
        return
    print(f"{machine()}; SmolLM2-135M-Instruct in {asked.dtype}, layers: {asked.layers}, steps of {asked.rows} rows\n")
    print("| what | tokens per second | ratio | |\n|---|---|---|---|")
    cost_rows(own, asked.train, asked.repeats)
    memory_rows(asked)


if __name__ == "__main__":
    main()

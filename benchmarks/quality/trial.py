"""Is a trial to be believed? Whole fine-tunes of what a trial has tried, on the same rows in the same order.

    alphatoken trial run.dir=R ...
    python -m benchmarks.quality.trial R [the trial's own overrides] [--only NAME ...] [--seeds 0 ...]

All weights learn, at a peak of 5e-5, in bfloat16 autocast; losses are on the trial's held-out rows. Each is timed beside the
trial's own fine-tune of the same mask and seed, made anew in the same process: CPU seconds, both with what they measure, the
trial's without loading the model and the hidden states from below, which all of its fine-tunes share and a line of its own states.
The first table sets losses and times beside each other, the second says how far the losses agree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphatoken.jobs.session import Session
from alphatoken.jobs.trial import of_the_run
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.trial.completions import make_completions
from alphatoken.pipeline.trial.entering import TrialRows
from alphatoken.pipeline.trial.inputs import TrialInputs, trial_inputs
from alphatoken.pipeline.trial.stage import task_of, worker_arguments
from alphatoken.pipeline.trial.worker import TrialTask, TrialWorker
from benchmarks.quality.finetune import Recipe, Tokens, finetune, mean_loss
from benchmarks.quality.noise import ranks

Key = tuple[str, int]


class Shorts:
    """The trial's own fine-tunes, one process and no Ray; ``once``: CPU seconds for what they share."""

    def __init__(self, run: Run, inputs: TrialInputs, tasks: list[TrialTask], place: str) -> None:
        """``tasks``: all of them, whose rows the hidden states are made of. ``place``: an empty directory for their files."""
        completions = make_completions(run, inputs.prompts, inputs.completions_fingerprint)
        rows = TrialRows(inputs.sample, inputs.held_out.rows, completions, inputs.retention, inputs.pairs)
        self.storage = Storage(place)
        arguments = {**worker_arguments(run, inputs, rows), "storage": self.storage, "name": Path(place).name}
        cpu = time.process_time()
        self.worker = TrialWorker(**arguments)
        self.worker.states.fill(range(len(inputs.sample)))
        self.once = time.process_time() - cpu
        self(tasks[0])  # memory is touched for the first time

    def __call__(self, task: TrialTask) -> tuple[float, float]:
        """Loss on the held-out rows, and CPU seconds."""
        cpu = time.process_time()
        self.worker(task, lambda steps: None)
        return self.storage.read_json(task.output)["adaptation"], time.process_time() - cpu


def whole(place: str, inputs: TrialInputs, task: TrialTask, recipe: Recipe) -> dict[str, Any]:
    """One whole fine-tune: loss on the held-out rows, and seconds of CPU for training and measuring."""
    train: Tokens = [(ids, row.tolist()) for ids, row in zip(inputs.sample.input_ids, task.labels, strict=True)]
    rows = inputs.held_out.rows
    held_out: Tokens = list(zip(rows.input_ids, rows.labels, strict=True))
    model = load_model(ModelSource(place, dtype="float32"), torch.device("cpu"))
    began, cpu = time.monotonic(), time.process_time()
    finetune(model, train, recipe)
    loss = mean_loss(model, held_out)
    return {
        "name": task.candidate.name, "seed": task.seed, "loss": loss, "seconds": time.monotonic() - began,
        "cpu": time.process_time() - cpu,
    }  # fmt: skip


def agreement(found: list[dict[str, Any]], tried: dict[Key, dict[str, Any]]) -> str:
    """Over what both have: rank correlation, and of the pairs of one seed how many are ordered alike."""
    both = [(one["loss"], tried[one["name"], one["seed"]]["adaptation"], one["seed"]) for one in found]
    losses, trials = (np.array([pair[i] for pair in both]) for i in (0, 1))
    correlation = np.corrcoef(ranks(losses), ranks(trials))[0, 1] if len(both) > 2 else float("nan")
    pairs = [(a, b) for a, b in itertools.combinations(both, 2) if a[2] == b[2]]
    alike = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)
    return f"| {len(both)} | {correlation:.2f} | {alike} of {len(pairs)} |"


def main() -> None:
    """Measure what is missing, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    options, overrides = parser.parse_known_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    settings = of_the_run([f"run.dir={options.run}", *overrides], None)
    file = Path(options.run) / "whole-fine-tunes.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    have = {(one["name"], one["seed"]) for one in found}
    with (
        Progress() as progress,
        Session(settings, progress) as session,
        tempfile.TemporaryDirectory(prefix="side-by-side-") as places,
    ):
        inputs, place = trial_inputs(session.run), session.run.models.policy
        candidates = [one for one in inputs.candidates if one.kind != "untouched"]
        tasks = [
            task_of(session.run, inputs, one, seed)
            for one in candidates
            for seed in options.seeds
            if one.name in (options.only or [one.name for one in candidates]) and (one.name, seed) not in have
        ]
        shorts = Shorts(session.run, inputs, tasks, places) if tasks else None
        for task in tasks:
            assert shorts is not None
            one = whole(place, inputs, task, Recipe(inputs.extent.steps, settings.trial.batch_size, seed=task.seed))
            one["trial"], one["trial_cpu"] = shorts(task)
            one["trial_once_cpu"] = shorts.once
            found.append(one)
            with file.open("a") as out:
                out.write(json.dumps(one) + "\n")
            print(f"{one['name']}, seed {one['seed']}: {one['loss']:.4f}, {one['cpu']:.0f} s of CPU", flush=True)
    tried = {
        (one["candidate"], one["seed"]): one
        for one in (json.loads(p.read_text()) for p in Path(options.run).glob("trial/fine-tunes/*/*.json"))
        if not one["failed"]
    }
    found = [one for one in found if (one["name"], one["seed"]) in tried]
    print("| mask | seed | trial | whole | CPU s, trial | whole | times |\n|---|---|---|---|---|---|---|")
    for one in sorted(found, key=lambda one: one["loss"]):
        ours = tried[one["name"], one["seed"]]["adaptation"]
        times = (
            f"{one['trial_cpu']:.1f} | {one['cpu']:.0f} | {one['cpu'] / one['trial_cpu']:.1f}"
            if "trial" in one
            else "- | - | -"
        )
        print(f"| {one['name']} | {one['seed']} | {ours:.4f} | {one['loss']:.4f} | {times} |")
    beside = [one for one in found if "trial" in one]
    if beside:
        each, all_of = (sum(one[key] for one in beside) for key in ("trial_cpu", "cpu"))
        once = beside[-1]["trial_once_cpu"]
        print(
            f"\n{len(beside)} of each, side by side: {all_of:.0f} s of CPU whole, {each:.0f} s in the trial and {once:.0f} s once for what "
            f"they share: {all_of / each:.1f} times less, with that {all_of / (each + once):.1f}"
        )
    print("\n| in both | rank correlation | pairs ordered alike |\n|---|---|---|")
    print(agreement(found, tried))


if __name__ == "__main__":
    main()

"""Is a trial to be believed? Whole fine-tunes of what a trial has tried, on the same rows in the same order.

    alphatoken trial run.dir=R ...
    python -m benchmarks.quality.trial R [the trial's own overrides] [--only NAME ...] [--seeds 0 ...]

All weights learn, at a peak of 5e-5, in bfloat16 autocast; losses are on the trial's held-out rows. The
first table sets them beside the trial's, the second says how far they agree and how much longer they take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
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
from alphatoken.pipeline.trial.candidates import labels_of
from alphatoken.pipeline.trial.inputs import TrialInputs, trial_inputs
from alphatoken.pipeline.trial.stage import SEED_STRIDE
from benchmarks.quality.finetune import Recipe, Tokens, finetune, mean_loss
from benchmarks.quality.noise import ranks

Key = tuple[str, int]


def whole(place: str, inputs: TrialInputs, key: Key, recipe: Recipe, run_seed: int) -> dict[str, Any]:
    """One whole fine-tune: loss on the held-out rows, and seconds of CPU for training and measuring."""
    name, seed = key
    candidate = next(one for one in inputs.candidates if one.name == name)
    labels = labels_of(candidate, inputs.sample, SEED_STRIDE * (run_seed + 1) + seed, inputs.masks)
    train: Tokens = [(ids, row.tolist()) for ids, row in zip(inputs.sample.input_ids, labels, strict=True)]
    rows = inputs.held_out.rows
    held_out: Tokens = list(zip(rows.input_ids, rows.labels, strict=True))
    model = load_model(ModelSource(place, dtype="float32"), torch.device("cpu"))
    began, cpu = time.monotonic(), time.process_time()
    finetune(model, train, recipe)
    loss = mean_loss(model, held_out)
    return {
        "name": name, "seed": seed, "loss": loss, "seconds": time.monotonic() - began, "cpu": time.process_time() - cpu,
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
    with Progress() as progress, Session(settings, progress) as session:
        inputs, place = trial_inputs(session.run), session.run.models.policy
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    have = {(one["name"], one["seed"]) for one in found}
    names = options.only or [one.name for one in inputs.candidates if one.kind != "untouched"]
    for key in itertools.product(names, options.seeds):
        if key in have:
            continue
        recipe = Recipe(inputs.extent.steps, settings.trial.batch_size, seed=key[1])
        one = whole(place, inputs, key, recipe, settings.run.seed)
        found.append(one)
        with file.open("a") as out:
            out.write(json.dumps(one) + "\n")
        print(f"{key[0]}, seed {key[1]}: {one['loss']:.4f}, {one['cpu']:.0f} s of CPU", flush=True)
    tried = {
        (one["candidate"], one["seed"]): one
        for one in (json.loads(p.read_text()) for p in Path(options.run).glob("trial/fine-tunes/*/*.json"))
        if not one["failed"]
    }
    found = [one for one in found if (one["name"], one["seed"]) in tried]
    print("| mask | seed | trial | whole | CPU seconds of the whole one |\n|---|---|---|---|---|")
    for one in sorted(found, key=lambda one: one["loss"]):
        ours = tried[one["name"], one["seed"]]["adaptation"]
        print(f"| {one['name']} | {one['seed']} | {ours:.4f} | {one['loss']:.4f} | {one['cpu']:.0f} |")
    print("\n| in both | rank correlation | pairs ordered alike |\n|---|---|---|")
    print(agreement(found, tried))


if __name__ == "__main__":
    main()

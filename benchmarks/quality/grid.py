"""The rows of the quality table: which values, which mask, which fine-tune.

`python -m benchmarks.quality.grid [--only NAME ...] [--seeds 0 1 2]` makes what is missing and prints the table. Every
fine-tune is one line in results.jsonl; a killed grid goes on with the same command, and several may run at once. Tokens
are valued once per point of the model; rows that differ in the mask alone share these values.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphatoken.jobs.config import load
from alphatoken.pipeline.prepare.draw import draw_order
from alphatoken.pipeline.prepare.example import example_model
from alphatoken.pipeline.prepare.tokenize import ExampleMaker
from benchmarks.quality.finetune import Recipe, Tokens, finetune, mean_loss
from benchmarks.quality.loop import closed_loop
from benchmarks.quality.rows import Rows, load_rows

TRAIN, VALIDATION, FISHER, HELD_OUT = 216, 32, 32, 40
CHOSEN_BY = ("choose", "choose_general")  # settings are chosen on these rows, and reported on the others
COLUMNS = ("report", "humaneval", "general", "english")
UNTOUCHED = "anchor.drift=none"
ONLY_PAPER = "valuation=paper"  # its columns and the loss
# What is valued; which mask is made of it, each row says.
RUNS: dict[str, tuple[str, ...]] = {
    # What a user gets who changes nothing: every column, at the end of a warm-up that makes the drift.
    "default": (),
    # Every column at one point, the untouched model; no drift, so no stability.
    "untouched": (UNTOUCHED,),
    "kfac": (UNTOUCHED, "anchor.precondition=kfac"),
    "adam": (ONLY_PAPER, UNTOUCHED, "anchor.precondition=adam"),
    "kfac-trajectory": (
        ONLY_PAPER, "anchor.drift=warmup", "anchor.precondition=kfac", "anchor.snapshots=3", "anchor.snapshot_scale=rms",
        "anchor.warmup.steps=16", "anchor.warmup.examples=64",
    ),
    # The paper's loop in advance, on the scored layers alone: as many steps of as many rows as the fine-tune will take.
    "rehearsal": (
        "valuation=rehearsal", "valuation.rehearsal.batch_size=8", "valuation.rehearsal.learning_rate=5e-5",
        "valuation.rehearsal.refresh=1", "valuation.rehearsal.stability_weight=0",
    ),
    # The drift of a whole training run on the scored layers, so that stability says what training on everything would do.
    "warm": (
        "anchor.drift=warmup", "anchor.warmup.steps=27", "anchor.warmup.batch_size=8", "anchor.warmup.learning_rate=1e-4",
        f"anchor.warmup.examples={TRAIN}",
    ),
    # After the fine-tune on everything: the paper's value there, its mean over both ends, and what that has left to learn.
    "paper-after": (ONLY_PAPER, UNTOUCHED, "model.policy={fine_tuned}"),
    "paper-ends": (
        ONLY_PAPER, UNTOUCHED, "model.policy=[{model},{fine_tuned}]", "model.reference={model}",
        "anchor.snapshot_scale=rms", "model.dtype=bfloat16",
    ),
    "excess-loss": (
        "valuation.scores=[loss]", "valuation.reference_loss=true", "model.policy={model}", "model.reference={fine_tuned}",
    ),
    # No model is asked: for masks that look at no values.
    "unvalued": ("valuation.scores=[]",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: values of ``run``, masked with ``mask`` overrides."""

    name: str
    run: str
    mask: tuple[str, ...] = ()
    steps: int = Recipe().steps

    @property
    def drawn(self) -> bool:
        """Whether the mask is drawn at random."""
        return RANDOM in self.mask

    @property
    def slug(self) -> str:
        """The name as a file name and a Hydra value."""
        return self.name.replace(" ", "_").replace("=", "").replace(",", "")


EVERY = "mask.skip_first=0"  # every token may be kept
FIRST = "mask.skip_first=1"
PAPER = ("mask.score=paper", "mask.stability_weight=0")
PAPER_WITH_STABILITY = ("mask.score=paper", "mask.stability_weight=1.5")
MINUS_LOSS = ("mask.normalize=rms", "mask.loss_weight=1")
RANDOM, FULL, ENTROPY, LOSS = (f"mask.score={score}" for score in ("random", "full", "entropy", "loss"))


def _at(rho: float, *more: str) -> tuple[str, ...]:
    return (f"mask.rho={rho}", *more)


EVERYTHING = Row("full", "unvalued", (FULL,))
ROWS = [
    EVERYTHING,
    Row("random 0.5", "unvalued", _at(0.5, RANDOM)),
    Row("default 0.5", "default", _at(0.5)),
    Row("default lambda=1.5 0.5", "default", _at(0.5, "mask.stability_weight=1.5")),
    # Against wrong tokens, of which the default sees none; see noise.py. What it costs where there are none:
    Row("default and loss 0.5", "default", _at(0.5, *MINUS_LOSS)),
    Row("default and loss 0.7", "default", _at(0.7, *MINUS_LOSS)),
    Row("paper 0.5", "untouched", _at(0.5, *PAPER)),
    Row("kfac 0.5", "kfac", _at(0.5, *PAPER)),
    # Whatever the label is: along the validation gradient, plain and preconditioned, and with no direction at all.
    Row("information 0.5", "untouched", _at(0.5, EVERY)),
    Row("information-kfac 0.5", "kfac", _at(0.5, EVERY)),
    Row("information-kfac 0.3", "kfac", _at(0.3, EVERY)),
    Row("information-kfac 0.7", "kfac", _at(0.7, EVERY)),
    Row("information-warm 0.5", "warm", _at(0.5, EVERY)),
    Row("information-warm least_stable=0.02 0.5", "warm", _at(0.5, EVERY, "mask.least_stable=0.02")),
    Row("information skip_first=1 0.5", "untouched", _at(0.5, FIRST)),
    Row("information-kfac skip_first=1 0.5", "kfac", _at(0.5, FIRST)),
    Row("entropy skip_first=1 0.5", "untouched", _at(0.5, ENTROPY, FIRST)),
    Row("random skip_first=1 0.5", "unvalued", _at(0.5, RANDOM, FIRST)),
    Row("full skip_first=1", "unvalued", (FULL, FIRST)),
    Row("entropy 0.5", "untouched", _at(0.5, ENTROPY)),
    Row("loss 0.5", "untouched", _at(0.5, LOSS)),
    Row("rehearsal 0.5", "rehearsal", _at(0.5)),
    Row("kfac token_id 0.5", "kfac", _at(0.5, *PAPER, "mask.scope=token_id")),
    Row("kfac-trajectory 0.5", "kfac-trajectory", _at(0.5, *PAPER)),
    Row(
        "kfac-trajectory lambda=1.5 rms 0.5",
        "kfac-trajectory",
        _at(0.5, *PAPER_WITH_STABILITY, "mask.normalize=rms"),
    ),
    Row("paper token_id 0.5", "untouched", _at(0.5, *PAPER, "mask.scope=token_id")),
    Row("paper lambda=1.5 0.5", "default", _at(0.5, *PAPER_WITH_STABILITY)),
    Row("paper lambda=1.5 rms 0.5", "default", _at(0.5, *PAPER_WITH_STABILITY, "mask.normalize=rms")),
    Row("adam 0.5", "adam", _at(0.5, *PAPER)),
    Row("paper after 0.5", "paper-after", _at(0.5, *PAPER)),
    Row("paper both ends 0.5", "paper-ends", _at(0.5, *PAPER)),
    Row("excess loss 0.5", "excess-loss", _at(0.5, "mask.score=excess_loss")),
    Row("kfac weight 0.5", "kfac", _at(0.5, *PAPER, "mask.rule=weight")),
    Row("random 0.3", "unvalued", _at(0.3, RANDOM)),
    Row("random 0.7", "unvalued", _at(0.7, RANDOM)),
    Row("random 0.9", "unvalued", _at(0.9, RANDOM)),
    Row("information-kfac 0.9", "kfac", _at(0.9, EVERY)),
    Row("default 0.3", "default", _at(0.3)),
    Row("default 0.7", "default", _at(0.7)),
    Row("default 0.9", "default", _at(0.9)),
    # As many trained tokens as 27 steps on all of them.
    Row("full, 54 steps", "unvalued", (FULL,), 54),  # as many steps, twice the tokens
    Row("random 0.5, 54 steps", "unvalued", _at(0.5, RANDOM), 54),
    Row("default 0.5, 54 steps", "default", _at(0.5), 54),
    Row("kfac 0.7", "kfac", _at(0.7, *PAPER)),
    Row("kfac token_id 0.75", "kfac", _at(0.75, *PAPER, "mask.scope=token_id")),
    Row("kfac-trajectory 0.7", "kfac-trajectory", _at(0.7, *PAPER)),
    Row("loss 0.7", "untouched", _at(0.7, LOSS)),
]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSON object per line; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def without_prompts(files: Sequence[Path], seed: int) -> list[Path]:
    """The same files beside these, without the rows that the pipeline would draw as Fisher prompts."""
    rows = [file.read_text().splitlines(keepends=True) for file in files]
    drawn = set(islice(draw_order(sum(map(len, rows)), seed), FISHER))
    numbers, found = count(), []
    for file, own in zip(files, rows, strict=True):
        found.append(file.with_stem(f"{file.stem}-without-{FISHER}-prompts-{seed}"))
        text = "".join([line for line in own if next(numbers) not in drawn])
        if not found[-1].exists() or found[-1].read_text() != text:  # it may be read by another grid
            found[-1].write_text(text)
    return found


class Quality:
    """A directory with data, runs and results."""

    runs = RUNS
    file = "results.jsonl"

    def __init__(self, place: Path) -> None:
        self.place, self.model = place, example_model()
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.rows = self.load()
        validation = {"validation": self.rows.validation, "more_validation": self.rows.validation + self.rows.spare}
        for name, rows in {"train": self.train_rows(), **validation}.items():
            write_rows(place / f"{name}.jsonl", rows)

    def load(self) -> Rows:
        """All rows, by use."""
        return load_rows(TRAIN + FISHER, VALIDATION, HELD_OUT)

    def train_rows(self) -> list[dict[str, Any]]:
        """What is valued and trained on."""
        return self.rows.train

    def tokens(self, rows: list[dict[str, Any]]) -> Tokens:
        """Rows as the pipeline tokenizes them."""
        make = ExampleMaker(self.tokenizer, 1024, "auto", {}, len(self.tokenizer))
        return [(example.input_ids, example.labels) for example in (make(row, "row") for row in rows)]

    def masked(self, row: Row, seed: int = 0) -> tuple[Tokens, list[list[float]] | None]:
        """Labels (and soft weights) of one row, through the pipeline's own commands."""
        files = sorted((self.piped(row, seed) / "masks" / row.slug / "data").glob("*.parquet"))
        table = [r for file in files for r in pq.read_table(file).to_pylist()]
        soft = [r["loss_weight"] for r in table] if table and "loss_weight" in table[0] else None
        return [(r["input_ids"], r["labels"]) for r in table], soft

    def piped(self, row: Row, seed: int = 0) -> Path:
        """The run directory, with the values of ``row.run`` and the mask of ``row``.

        With each ``seed`` a random mask is drawn anew, and with it the rows that are held out as Fisher prompts: from
        one draw to the next such masks differ more than fine-tunes on one of them do.
        """
        drawn = [f"run.seed={seed}"] if row.drawn and seed else []
        run = self.place / (f"{row.run}-{seed}" if drawn else row.run)
        own = [self._with_paths(override) for override in self.runs[row.run]]
        with FileLock(f"{run}.lock"):
            if not all((run / "masks" / row.slug / name).exists() for name in ("summary.json", "data")):
                train = [self.place / "train.jsonl"]
                self.alphatoken(run, train, f"mask.name={row.slug}", *own, *row.mask, *drawn)
        return run

    def alphatoken(self, run: Path, train: Sequence[Path], *overrides: str) -> None:
        """``alphatoken run`` over the files ``train`` into ``run``: values once, and a mask.

        Where no Fisher is made, the rows that would be its prompts are left out beforehand, so that every run values and
        masks the same ones. One worker on this process's threads: where several grids run at once, more would wait for
        each other.
        """
        own = [f"data.validation={self.place / 'validation.jsonl'}", f"anchor.fisher.prompts={FISHER}"]
        own += ["cluster.workers=1", f"cluster.cpus_per_worker={torch.get_num_threads()}"]
        settings = load([*own, *overrides])
        if not settings.makes_fisher:
            train = without_prompts(train, settings.run.seed)
        command = [sys.executable, "-m", "alphatoken.jobs", "run", f"run.dir={run}"]
        subprocess.run([*command, f"data.train=[{','.join(map(str, train))}]", *own, *overrides], check=True)

    def _with_paths(self, override: str) -> str:
        paths = {"model": self.model, "place": self.place}
        if "{fine_tuned}" in override:  # minutes, where it has not been made
            paths["fine_tuned"] = self.fine_tuned()
        return override.format(**paths)

    def fine_tuned(self, decay: bool = True) -> Path:
        """The model after the fine-tune on every response token; ``decay``: see Recipe."""
        place = self.place / ("fine-tuned" if decay else "fine-tuned-constant")
        with FileLock(f"{place}.lock"):
            if not place.exists():
                model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
                finetune(model, self.masked(EVERYTHING)[0], Recipe(decay=decay))
                partial = place.with_name(f"{place.name}.partial")
                self.tokenizer.save_pretrained(partial)
                model.save_pretrained(partial)
                partial.rename(place)
        return place

    def measure(self, row: Row | None, seed: int) -> dict[str, Any]:
        """Fine-tune on one row's mask and measure; None: the model untouched."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        trained, started = 0, time.monotonic()
        recipe = Recipe(steps=row.steps if row else 0, seed=seed)
        if row is not None and row.run == "loop":
            whole, _ = self.masked(EVERYTHING)
            trained = finetune(model, whole, recipe, closed_loop(model, self.tokens(self.rows.validation), seed))
        elif row is not None:
            train, soft = self.masked(row, seed)
            trained = finetune(model, train, recipe, weights=soft)
        found = {name: mean_loss(model, self.tokens(self.rows.held_out[name])) for name in (*CHOSEN_BY, *COLUMNS)}
        return {
            "seed": seed,
            "trained": trained,
            "recipe": asdict(recipe),
            "seconds": time.monotonic() - started,
            **found,
        }

    def results(self) -> list[dict[str, Any]]:
        """What has been measured so far."""
        return results_in(self.place / self.file)

    def run(self, rows: list[Row | None], seeds: list[int]) -> None:
        """Measure what is missing, seed by seed."""
        for seed in seeds:
            for row in rows:
                name = row.name if row else "untouched"
                if any(r["name"] == name and r["seed"] == seed for r in self.results()) or (row is None and seed):
                    continue
                try:
                    with FileLock(self.place / f"{self.file}-{row.slug if row else name}-{seed}.lock", timeout=0):
                        found = {"name": name, **self.measure(row, seed)}
                except Timeout:
                    continue  # another process is at it
                with open(self.place / self.file, "a") as file:
                    file.write(json.dumps(found) + "\n")
                print(json.dumps(found), flush=True)


def results_in(file: Path) -> list[dict[str, Any]]:
    """What a file holds, a measurement per line; nothing where there is none."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """Mean over seeds, and half the range where there are several."""
    lines = ["| mask | seeds | code | HumanEval | general | English |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(r["name"] for r in results):
        mine = [r for r in results if r["name"] == name]
        cells = []
        for column in COLUMNS:
            values = [r[column] for r in mine]
            spread = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.4f}{spread}")
        lines.append(f"| {name} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the grid, or only print what it has found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    quality = Quality(options.place.resolve())
    rows: list[Row | None] = [None, *ROWS, Row("paper's loop 0.5 (online)", "loop")]
    if options.only:
        rows = [row for row in rows if (row.name if row else "untouched") in options.only]
    if not options.only_print:
        quality.run(rows, options.seeds)
    print(table(quality.results()))


if __name__ == "__main__":
    main()

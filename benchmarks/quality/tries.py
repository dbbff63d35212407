"""Is a trial to be believed? Short fine-tunes as a trial makes them, on masks whose whole fine-tunes are on record.

    python -m benchmarks.quality.tries [--setting NAME ...] [--seeds 0 1 2] [--only MASK ...] [--print]

The masks, held-out rows and seeds of `benchmarks.quality.grid` on a third of its rows: 72 of the 216 that the whole
fine-tunes learned from, as a trial takes a sample; masks are made over the sample, values in bfloat16. Every fine-tune is one
line in tries.jsonl; a killed benchmark goes on with the same command. The table says how far each setting's losses agree
with the record, and what a fine-tune costs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from alphatoken.jobs.config import load
from alphatoken.jobs.session import Session
from alphatoken.jobs.trial import made_masks, of_the_run
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.trial.candidates import random_labels, without_first
from benchmarks.quality.agreement import HEAD, agreement, mean_by_name, record
from benchmarks.quality.finetune import Tokens
from benchmarks.quality.grid import FISHER, ROWS, RUNS, Quality, Row, results_in
from benchmarks.quality.short import Setting, ShortFineTunes

HELD_OUT = {"code": "report", "general": "general"}
VALUED = ("default", "untouched", "kfac")  # runs of the grid; rows without values are drawn here
BFLOAT16 = "model.dtype=bfloat16"
EXAMPLES = 72


SETTINGS = {
    "trial's own": Setting(),
    "learning rate 1e-4": Setting(learning_rate=1e-4),
    "learning rate 1e-3": Setting(learning_rate=1e-3),
    "all examples": Setting(examples=EXAMPLES),
    "half of the examples, twice": Setting(examples=20, epochs=2.0),
    "batches of 8": Setting(batch_size=8),
    "6 layers": Setting(layers=6),
    "1 layer": Setting(layers=1),
    "adapters in all layers": Setting(train="lora", learning_rate=1e-3),
}


class Sampled(Quality):
    """As Quality, on the first rows of its training rows; the record is of all."""

    def train_rows(self) -> list[dict[str, Any]]:
        """What is valued and tried, and the rows that are held out of it as Fisher prompts."""
        return self.rows.train[: EXAMPLES + FISHER]


class Tries:
    """Masks, models and measurements of one place."""

    def __init__(self, place: Path, runs: Sequence[str], columns: Sequence[str]) -> None:
        self.quality, self.runs = Sampled(place), runs
        self.file = place / "tries.jsonl"
        rows = self.quality.rows.held_out
        chosen = {name: self.quality.tokens(rows[own]) for name, own in HELD_OUT.items() if name in columns}
        self.short = ShortFineTunes(self.quality.model, {name: _sequences(own) for name, own in chosen.items()})

    def value(self) -> None:
        """Value the rows and make every mask, each kind of values in one go."""
        for run in self.runs:
            rows = [row for row in ROWS if row.run == run]
            place = self.quality.place / run
            missing = [row for row in rows if not (place / "masks" / row.slug / "summary.json").exists()]
            if not missing:
                continue
            first = replace(rows[0], mask=(*rows[0].mask, BFLOAT16))
            self.quality.piped(first)
            masks = {row.slug: load([*RUNS[run], *row.mask, f"mask.name={row.slug}"]).mask for row in missing}
            with Progress() as progress, Session(of_the_run([f"run.dir={place}"], None), progress) as session:
                session.claim()
                made_masks(session, masks)

    def labelled(self, row: Row, seed: int) -> Sequences:
        """The rows with the labels that the mask ``row`` leaves them; a random one is drawn anew with each seed."""
        if row.run in VALUED:
            return _sequences(self.quality.masked(row)[0])
        prepared = sorted((self.quality.place / self.runs[0] / "prepared").glob("part-*.parquet"))
        whole = _prepared(prepared)
        labels = [np.asarray(one, np.int32) for one in whole.labels]
        if row.drawn:
            labels = random_labels(labels, whole.ids, float(row.name.split()[-1]), seed)
        elif "mask.skip_first=1" in row.mask:
            labels = [without_first(one) for one in labels]
        return Sequences(whole.ids, whole.input_ids, [one.tolist() for one in labels])

    def measure(self, row: Row | None, setting: Setting, seed: int) -> dict[str, Any]:
        """One short fine-tune on a mask; None: the model untouched."""
        return self.short.measure(self.labelled(row, seed) if row else None, setting, seed)

    def run(self, names: list[str], seeds: list[int], only: list[str]) -> None:
        """Measure what is missing, seed by seed."""
        rows: list[Row | None] = [None, *(row for row in ROWS if row.run in self.runs or row.name in DRAWN)]
        recorded = record("code")
        for seed in seeds:
            for setting in names:
                for row in rows:
                    name = row.name if row else "untouched"
                    key = {"setting": setting, "name": name, "seed": seed}
                    if (only and name not in only) or (row is None and seed) or name not in recorded:
                        continue
                    if any(key.items() <= line.items() for line in results_in(self.file)):
                        continue
                    found = {**key, **self.measure(row, SETTINGS[setting], seed)}
                    with self.file.open("a") as out:
                        out.write(json.dumps(found) + "\n")
                    print(json.dumps(found), flush=True)


DRAWN = ("full", "full skip_first=1", "random 0.3", "random 0.5", "random 0.7", "random 0.9")


def _sequences(rows: Tokens) -> Sequences:
    return Sequences([f"row-{i}" for i in range(len(rows))], [ids for ids, _ in rows], [labels for _, labels in rows])


def _prepared(files: list[Path]) -> Sequences:
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return Sequences(*([row[name] for row in rows] for name in ("id", "input_ids", "labels")))


def table(found: list[dict[str, Any]]) -> str:
    """A line per setting and kind of held-out rows."""
    head = f"| setting | seeds | CPU s a fine-tune | held-out rows | {HEAD} |"
    lines = [head, "|" + "---|" * head.count(" | ") + "---|"]
    for setting in dict.fromkeys(line["setting"] for line in found):
        own = [line for line in found if line["setting"] == setting]
        seeds = len({line["seed"] for line in own})
        cost = np.mean([line["cpu"] for line in own if line["name"] != "untouched"])
        for column in HELD_OUT:
            measured = [line for line in own if column in line]
            if len({line["name"] for line in measured}) < 3:
                continue
            said = agreement(mean_by_name(measured, column), record(column))
            lines.append(f"| {setting} | {seeds} | {cost:.0f} | {column} | {said} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, or only print what has been found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, default=Path("runs/tries"))
    parser.add_argument("--setting", nargs="*", choices=list(SETTINGS), default=["trial's own"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--runs", nargs="*", choices=VALUED, default=VALUED, help="of the grid, whose masks are tried")
    parser.add_argument("--columns", nargs="*", choices=list(HELD_OUT), default=list(HELD_OUT), help="held-out rows")
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    place = options.place.resolve()
    if not options.only_print:
        tries = Tries(place, options.runs, options.columns)
        tries.value()
        tries.run(options.setting, options.seeds, options.only)
    print(table(results_in(place / "tries.jsonl")))


if __name__ == "__main__":
    main()

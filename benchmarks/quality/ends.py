"""Do values hold while the model learns? In minutes, what a fine-tune from each mask says in hours.

    python -m benchmarks.quality.ends [--place runs/quality] [--constant] [--cut 190]

The grid's fine-tune on every response token is made once and kept; with --constant, the same without a warm-up and a
decay of the learning rate; with --cut, on rows of code of any length, each response cut after so many tokens. Then each
kind of value is taken at both of its ends, the untouched and the fine-tuned model, of the rows that it was trained on
and of held-out rows of the same kind: one run of values per end, and one more for K-FAC. Rank correlations over response
tokens: between the values of the two ends; and of the first with how much the token's loss has fallen from end to end,
on either rows.
For what leaving a token out does, see benchmarks.fidelity.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from alphatoken.pipeline.maths.batch import IGNORED
from benchmarks.quality.finetune import cut_responses
from benchmarks.quality.grid import FISHER, HELD_OUT, TRAIN, UNTOUCHED, VALIDATION, Quality, write_rows
from benchmarks.quality.noise import ranks
from benchmarks.quality.rows import Rows, load_rows

# Name -> the run that it is a column of, that run's overrides, and the columns that are added up.
PLAIN, CURVED = (UNTOUCHED,), (UNTOUCHED, "anchor.precondition=kfac")
ADAPTATION = ("adaptation_direct", "adaptation_causal")
VALUES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "paper": ("plain", PLAIN, ADAPTATION),
    "paper, K-FAC": ("kfac", CURVED, ADAPTATION),
    "information": ("plain", PLAIN, ("information",)),
    "information, K-FAC": ("kfac", CURVED, ("information",)),
    "entropy": ("plain", PLAIN, ("entropy",)),
    "loss": ("plain", PLAIN, ("loss",)),
}
CHOOSE = "choose"  # the held-out rows that settings are chosen by
Floats = npt.NDArray[np.float64]


class CutQuality(Quality):
    """As Quality, on rows of code of any length, each response cut after ``cut`` tokens."""

    def __init__(self, place: Path, cut: int) -> None:
        self.cut = cut
        super().__init__(place)

    def load(self) -> Rows:
        """Rows of code pre-tokenized, since a cut is made between tokens."""
        rows = load_rows(TRAIN + FISHER, VALIDATION, HELD_OUT, longest_code=math.inf)
        train, validation, spare, choose = map(
            self._cut, (rows.train, rows.validation, rows.spare, rows.held_out[CHOOSE])
        )
        return replace(rows, train=train, validation=validation, spare=spare, held_out={CHOOSE: choose})

    def _cut(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"input_ids": ids, "labels": labels} for ids, labels in cut_responses(self.tokens(rows), self.cut)]


def value(quality: Quality, name: str, model: Path, end: str) -> Path:
    """The run directory with the values ``name``, and others, of both kinds of rows at ``model``."""
    run, overrides, _ = VALUES[name]
    place = quality.place / "ends" / f"{run}-{end}"
    if not (place / "masks" / "default" / "summary.json").exists():
        held_out = write_rows(quality.place / "ends" / "held_out.jsonl", quality.rows.held_out[CHOOSE])
        train = [quality.place / "train.jsonl", held_out]
        quality.alphatoken(place, train, f"model.policy={model}", "model.dtype=bfloat16", *overrides)
    return place


def columns(run: Path, names: Sequence[str]) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """The sum of the columns ``names`` and the loss of all response tokens, and whether the token is of a held-out row."""
    found, losses, held_out = [], [], []
    for file in sorted((run / "values").glob("*.parquet")):
        prepared = pq.read_table(run / "prepared" / file.name).to_pylist()
        for row, values in zip(prepared, pq.read_table(file).to_pylist(), strict=True):
            inside = np.array(row["labels"]) != IGNORED
            own = {k: np.array(v, np.float64)[inside] for k, v in values.items() if k in {*names, "loss"}}
            found.append(np.sum([own[name] for name in names], axis=0))
            losses.append(own["loss"])
            held_out.append(np.full(int(inside.sum()), "held_out" in row["source"]))
    return np.concatenate(found), np.concatenate(losses), np.concatenate(held_out)


def rank_correlation(one: Floats, other: Floats) -> float:
    """Spearman's; equal scores share the mean of their ranks."""
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def line(start: Path, end: Path, names: Sequence[str]) -> dict[str, Any]:
    """The correlations of one kind of value, the sum of the columns ``names``."""
    before, losses, held_out = columns(start, names)
    after, lower, _ = columns(end, names)
    fallen = losses - lower
    return {
        "ends": rank_correlation(before[~held_out], after[~held_out]),
        "trained": rank_correlation(before[~held_out], fallen[~held_out]),
        "held out": rank_correlation(before[held_out], fallen[held_out]),
    }


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", nargs="*", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--constant", action="store_true", help="fine-tune at one learning rate from end to end")
    parser.add_argument("--cut", type=int, help="rows of code of any length, each response cut after so many tokens")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    place = options.place.resolve()
    quality = CutQuality(place / f"cut-{options.cut}", options.cut) if options.cut else Quality(place)
    end = "end-constant" if options.constant else "end"
    models = {"start": quality.model, end: quality.fine_tuned(decay=not options.constant)}
    head = (
        "| values at the untouched model | with those at the fine-tuned one | with the fall of the loss, trained rows"
    )
    print(f"{head} | held-out rows |\n|---|---|---|---|")
    for name in options.only:
        start, after = (value(quality, name, model, end) for end, model in models.items())
        found = line(start, after, VALUES[name][2])
        print(f"| {name} | {' | '.join(f'{r:+.2f}' for r in found.values())} |", flush=True)


if __name__ == "__main__":
    main()

"""Planted noise: how well each column tells wrong response tokens from right ones, and what masks make of noisy data.

    python -m benchmarks.quality.noise [--rows 96] [--kinds tokens rows]       area under the curve of every column
    python -m benchmarks.quality.noise --finetune [--seeds 0 1 2]              fine-tunes on the noisy rows, as the grid's

A share of the response tokens of the quality benchmark's training rows is replaced by response tokens drawn from the
corpus (kind ``tokens``), or whole responses are handed round between prompts (kind ``rows``: every token of such a
response counts as planted). Validation rows stay clean. Values come from the pipeline's own commands on pre-tokenized
rows. What is made is kept: a killed benchmark goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from alphatoken.pipeline.maths.batch import IGNORED, response_start
from benchmarks.quality.finetune import Tokens
from benchmarks.quality.grid import (
    EVERYTHING,
    FISHER,
    LOSS,
    MINUS_LOSS,
    PAPER,
    RANDOM,
    TRAIN,
    UNTOUCHED,
    Quality,
    Row,
    _at,
    results_in,
    table,
)

SHARE = 0.2
KFAC = (UNTOUCHED, "anchor.precondition=kfac")
FASTER = "model.dtype=bfloat16"  # a quarter of the time
MORE_VALIDATION = "data.validation={place}/more_validation.jsonl"  # 119 rows for 32
PER_NORM = "mask.divide_by_gradient_norm=true"
DIRECTED = "valuation.scores=[paper,loss,gradient_norm]"
RUNS: dict[str, tuple[str, ...]] = {
    "default": (FASTER,),
    "untouched": (UNTOUCHED, FASTER, "valuation.exact=true"),
    "kfac": (*KFAC, FASTER, DIRECTED),
    "kfac-validation": (*KFAC, FASTER, DIRECTED, MORE_VALIDATION),
    "kfac-layers-1": (*KFAC, FASTER, DIRECTED, "valuation.layers=1"),
    "kfac-layers-6": (*KFAC, FASTER, DIRECTED, "valuation.layers=6"),
    "unvalued": ("valuation.scores=[]",),
}
ALIGNMENT = ("adaptation_direct", "adaptation_causal")
# Run -> name of a score -> the columns that are added up.
VALUED: dict[str, dict[str, tuple[str, ...]]] = {
    "default": {"information": ("information",)},
    "untouched": {"alignment": ALIGNMENT, "alignment, exact": ("adaptation_exact",)},
    "kfac": {"alignment, K-FAC": ALIGNMENT},
    "kfac-validation": {"alignment, K-FAC, 119 validation rows": ALIGNMENT},
    "kfac-layers-1": {"alignment, K-FAC, K=1": ALIGNMENT},
    "kfac-layers-6": {"alignment, K-FAC, K=6": ALIGNMENT},
}
ROWS = [
    EVERYTHING,
    Row("random 0.7", "unvalued", _at(0.7, RANDOM)),
    Row("default 0.7", "default", _at(0.7)),
    Row("default and loss 0.7", "default", _at(0.7, *MINUS_LOSS)),
    Row("paper 0.7", "untouched", _at(0.7, *PAPER)),
    Row("kfac 0.7", "kfac", _at(0.7, *PAPER)),
    Row("kfac, 119 validation rows 0.7", "kfac-validation", _at(0.7, *PAPER)),
    Row("kfac K=1 0.7", "kfac-layers-1", _at(0.7, *PAPER)),
    Row("kfac K=6 0.7", "kfac-layers-6", _at(0.7, *PAPER)),
    Row("loss 0.7", "untouched", _at(0.7, LOSS)),
    Row("paper per norm 0.7", "untouched", _at(0.7, *PAPER, PER_NORM)),
    Row("kfac per norm 0.7", "kfac", _at(0.7, *PAPER, PER_NORM)),
    Row("kfac and loss 0.7", "kfac", _at(0.7, *PAPER, *MINUS_LOSS)),
    Row("kfac per norm and loss 0.7", "kfac", _at(0.7, *PAPER, PER_NORM, *MINUS_LOSS)),
]
Floats = npt.NDArray[np.float64]
Planted = tuple[list[tuple[list[int], list[int]]], list[list[bool]]]  # rows, and which of their tokens are planted


def plant_tokens(rows: Tokens, share: float, seed: int) -> Planted:
    """Replace ``share`` of all response tokens by other response tokens of the corpus, drawn by their frequency."""
    generator = random.Random(seed)
    places = [(r, i) for r, (_, labels) in enumerate(rows) for i, label in enumerate(labels) if label != IGNORED]
    corpus = [rows[r][1][i] for r, i in places]
    noisy = [(list(ids), list(labels)) for ids, labels in rows]
    planted = [[False] * len(ids) for ids, _ in rows]
    for r, i in sorted(generator.sample(places, round(share * len(places)))):
        while (token := generator.choice(corpus)) == rows[r][1][i]:
            pass
        noisy[r][0][i] = noisy[r][1][i] = token
        planted[r][i] = True
    return noisy, planted


def swap_rows(rows: Tokens, share: float, seed: int) -> Planted:
    """Hand the responses of ``share`` of the rows round between them; a response goes from its first label on."""
    generator = random.Random(seed)
    chosen = generator.sample(range(len(rows)), round(share * len(rows)))
    cuts = [response_start(labels) for _, labels in rows]
    noisy = [(list(ids), list(labels)) for ids, labels in rows]
    planted = [[False] * len(ids) for ids, _ in rows]
    for own, other in zip(chosen, [*chosen[1:], *chosen[:1]], strict=True):
        (ids, labels), cut, start = rows[own], cuts[own], cuts[other]
        noisy[own] = (list(ids[:cut]) + list(rows[other][0][start:]), list(labels[:cut]) + list(rows[other][1][start:]))
        planted[own] = [i >= cut and label != IGNORED for i, label in enumerate(noisy[own][1])]
    return noisy, planted


PLANTERS = {"tokens": plant_tokens, "rows": swap_rows}


class NoisyQuality(Quality):
    """As Quality, on noisy training rows; ``kind``: of PLANTERS; ``rows``: that are trained on."""

    runs = RUNS

    def __init__(self, place: Path, kind: str, rows: int, seed: int) -> None:
        self.kind, self.count, self.seed = kind, rows + FISHER, seed
        super().__init__(place)

    def train_rows(self) -> list[dict[str, Any]]:
        """Pre-tokenized rows with ids."""
        noisy, self.planted = PLANTERS[self.kind](self.tokens(self.rows.train[: self.count]), SHARE, self.seed)
        return [{"id": f"row-{i}", "input_ids": ids, "labels": labels} for i, (ids, labels) in enumerate(noisy)]

    def columns(self, run: str) -> tuple[dict[str, Floats], npt.NDArray[np.bool_]]:
        """Scores (higher: rather clean) of all response tokens by name, and which of the tokens are planted."""
        found = self._values(run)
        loss, scores = found["loss"], {}
        for name, added in VALUED[run].items():
            scores[name] = np.sum([found[column] for column in added], axis=0)
            if added == ALIGNMENT:
                scores[f"{name} / gradient norm"] = scores[name] / found["gradient_norm"]
        scores |= {f"{n} and minus loss, rank sum": ranks(s) + ranks(-loss) for n, s in list(scores.items())}
        if run == "untouched":  # neither depends on the directions
            scores |= {"minus loss": -loss, "minus gradient norm": -found["gradient_norm"]}
        return scores, found["planted"].astype(bool)

    def _values(self, run: str) -> dict[str, Floats]:
        rows = [row for row in ROWS if row.run == run]
        place = self.piped(rows[0])
        columns: dict[str, list[Floats]] = {}
        for file in sorted((place / "values").glob("*.parquet")):
            prepared = pq.read_table(place / "prepared" / file.name).to_pylist()
            for row, values in zip(prepared, pq.read_table(file).to_pylist(), strict=True):
                inside = np.array(row["labels"]) != IGNORED
                values["planted"] = self.planted[int(row["id"].removeprefix("row-"))]
                for name, column in values.items():
                    if name != "id":
                        columns.setdefault(name, []).append(np.array(column, np.float64)[inside])
        return {name: np.concatenate(parts) for name, parts in columns.items()}


def ranks(scores: Floats) -> Floats:
    """1 .. n from the lowest on; equal scores share the mean of theirs."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def area_under_curve(scores: Floats, planted: npt.NDArray[np.bool_]) -> float:
    """The chance that a clean token scores higher than a planted one; equal scores count half."""
    clean = int((~planted).sum())
    wins = ranks(scores)[~planted].sum() - clean * (clean + 1) / 2
    return float(wins / (clean * planted.sum()))


def separate(quality: NoisyQuality, file: Path, runs: Iterable[str]) -> None:
    """Append the area under the curve of every column to ``file``, run by run, unless it is there."""
    for run in runs:
        key = {"kind": quality.kind, "rows": quality.count - FISHER, "seed": quality.seed, "run": run}
        if any(key.items() <= line.items() for line in results_in(file)):
            continue
        scores, planted = quality.columns(run)
        counts = {"tokens": len(planted), "planted": int(planted.sum())}
        found = [{**key, "column": n, "auc": area_under_curve(s, planted), **counts} for n, s in scores.items()]
        with open(file, "a") as out:
            out.write("".join(json.dumps(line) + "\n" for line in found))


def areas(found: Iterable[dict[str, Any]]) -> str:
    """One row per column, one column per kind of noise; the mean over seeds."""
    cells: dict[str, dict[str, list[float]]] = {}
    for line in found:
        cells.setdefault(line["column"], {}).setdefault(line["kind"], []).append(line["auc"])
    kinds = [kind for kind in PLANTERS if any(kind in row for row in cells.values())]
    head = [f"| score | {' | '.join(f'{kind} planted' for kind in kinds)} |", "|---|" + "---|" * len(kinds)]
    shown = {
        name: [f"{np.mean(row[kind]):.3f}" if kind in row else "-" for kind in kinds] for name, row in cells.items()
    }
    return "\n".join([*head, *[f"| {name} | {' | '.join(row)} |" for name, row in shown.items()]])


def main() -> None:
    """Measure what is missing, or only print what has been found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, default=Path("runs/noise"))
    parser.add_argument("--kinds", nargs="*", choices=list(PLANTERS), default=list(PLANTERS))
    parser.add_argument("--rows", type=int, default=TRAIN)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--only", nargs="*", help="names of fine-tunes, or without --finetune of RUNS")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of the fine-tunes")
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    file = options.place.resolve() / "areas.jsonl"
    for kind in options.kinds:
        place = options.place.resolve() / f"{kind}-{options.rows}-{options.seed}"
        if options.finetune:
            quality = NoisyQuality(place, kind, options.rows, options.seed)
            chosen: list[Row | None] = [row for row in ROWS if not options.only or row.name in options.only]
            if not options.only_print:
                quality.run(chosen, options.seeds)
            print(f"{kind}\n\n{table(quality.results())}\n")
        elif not options.only_print:
            separate(NoisyQuality(place, kind, options.rows, options.seed), file, options.only or VALUED)
    if not options.finetune:
        print(areas(line for line in results_in(file) if line["rows"] == options.rows))


if __name__ == "__main__":
    main()

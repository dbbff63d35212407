"""The unrolled direction on planted noise: rows, the area under the curve of a run's columns, and its masks' planted tokens.

    python -m benchmarks.quality.planted rows PLACE [--rows 64] [--validation 64] [--kind tokens|rows|clean]
                                                                                              train, validation, held-out .jsonl
    alphatoken run run.dir=PLACE/R anchor=unrolled data.train=PLACE/train.jsonl ...           docs/results.md has the settings
    python -m benchmarks.quality.planted areas PLACE PLACE/R [PLACE/OTHER ...]                clean against planted tokens
    python -m benchmarks.quality.planted kept PLACE PLACE/R                                   what every mask keeps of them

Rows and noise are those of `benchmarks.quality.noise` with the same number of rows; `alphatoken trial` then makes
the fine-tunes, on held-out rows of code that made no direction.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from alphatoken.pipeline.maths.batch import IGNORED
from benchmarks.quality.grid import VALIDATION, write_rows
from benchmarks.quality.noise import PLANTERS, SHARE, NoisyQuality, area_under_curve, plant_tokens, ranks

Floats = npt.NDArray[np.float64]
CLEAN = "clean"
# What a column says -> the columns of values/ that are added up, with their signs.
SCORES: dict[str, dict[str, float]] = {
    "adaptation": {"adaptation_direct": 1, "adaptation_causal": 1},
    "own step": {"adaptation_unrolled": 1},
    "information": {"information": 1},
    "minus loss": {"loss": -1},
}


def make_rows(place: Path, rows: int, validation: int, kind: str, seed: int) -> None:
    """Write the rows of a run and which tokens of the training rows are planted; ``kind``: of PLANTERS, or clean."""
    quality = NoisyQuality(place / "quality", "tokens" if kind == CLEAN else kind, rows, seed)
    whole = quality.tokens(quality.rows.train[:rows])
    noisy, planted = plant_tokens(whole, 0.0, seed) if kind == CLEAN else PLANTERS[kind](whole, SHARE, seed)
    write_rows(place / "train.jsonl", _pretokenized("train", noisy))
    rows_of_task = (quality.rows.validation + quality.rows.spare)[:validation]
    write_rows(place / "validation.jsonl", _pretokenized("validation", quality.tokens(rows_of_task)))
    write_rows(place / "held-out.jsonl", _pretokenized("held-out", quality.tokens(quality.rows.held_out["report"])))
    (place / "planted.json").write_text(json.dumps({f"train-{i}": row for i, row in enumerate(planted)}))


def _pretokenized(name: str, rows: Any) -> list[dict[str, Any]]:
    return [{"id": f"{name}-{i}", "input_ids": ids, "labels": labels} for i, (ids, labels) in enumerate(rows)]


def response_columns(place: Path, run: Path) -> dict[str, Floats]:
    """Every column of values/, and ``planted`` (0 or 1), at the response tokens."""
    planted = json.loads((place / "planted.json").read_text())
    columns: dict[str, list[Floats]] = {}
    for file in sorted((run / "prepared").glob("part-*.parquet")):
        values = pq.read_table(run / "values" / file.name).to_pylist()
        for row, own in zip(pq.read_table(file).to_pylist(), values, strict=True):
            inside = np.array(row["labels"]) != IGNORED
            for name, column in {**own, "planted": planted[row["id"]]}.items():
                if name != "id":
                    columns.setdefault(name, []).append(np.array(column, np.float64)[inside])
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def scores_of(found: dict[str, Floats]) -> dict[str, Floats]:
    """Each score that a run has, by itself and ranked together with minus the loss; higher is rather clean."""
    scores = {
        name: np.sum([sign * found[column] for column, sign in columns.items()], axis=0)
        for name, columns in SCORES.items()
        if set(columns) <= set(found)
    }
    both = {f"{n} and minus loss, rank sum": ranks(s) + ranks(scores["minus loss"]) for n, s in scores.items()}
    both.pop("minus loss and minus loss, rank sum")
    return {**scores, **both}


def areas(place: Path, runs: list[Path]) -> str:
    """A table with the area under the curve of every score of every run."""
    lines = ["| run | score | area under the curve |", "|---|---|---|"]
    for run in runs:
        found = response_columns(place, run)
        planted = found["planted"].astype(bool)
        for name, score in scores_of(found).items():
            lines.append(f"| {run.name} | {name} | {area_under_curve(score, planted):.3f} |")
    return "\n".join([*lines, f"\n{int(planted.sum()):,} of {len(planted):,} response tokens are planted."])


def kept(place: Path, run: Path) -> str:
    """A table with what each mask of a run keeps of all tokens, and of the planted ones."""
    planted = json.loads((place / "planted.json").read_text())
    lines = ["| mask | kept | of the planted tokens |", "|---|---|---|"]
    prepared = _rows(run / "prepared", "part-*", ["id", "input_ids", "labels"])
    for mask in sorted((run / "masks").iterdir()):
        masked = {tuple(r["input_ids"]): r["labels"] for r in _rows(mask / "data", "*", ["input_ids", "labels"])}
        labelled: list[npt.NDArray[np.bool_]] = []
        wrong: list[npt.NDArray[np.bool_]] = []
        for row in prepared:
            inside = np.array(row["labels"]) != IGNORED
            labelled.append(np.array(masked[tuple(row["input_ids"])])[inside] != IGNORED)
            wrong.append(np.array(planted[row["id"]])[inside])
        keeps, bad = np.concatenate(labelled), np.concatenate(wrong)
        lines.append(f"| {mask.name} | {keeps.mean():.1%} | {keeps[bad].mean() if bad.any() else float('nan'):.1%} |")
    return "\n".join(lines)


def _rows(folder: Path, name: str, columns: list[str]) -> list[dict[str, Any]]:
    return [
        r for file in sorted(folder.glob(f"{name}.parquet")) for r in pq.read_table(file, columns=columns).to_pylist()
    ]


def main() -> None:
    """Make the rows, or print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "areas", "kept"))
    parser.add_argument("place", type=Path)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--validation", type=int, default=2 * VALIDATION)
    parser.add_argument("--kind", choices=(*PLANTERS, CLEAN), default="tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    options = parser.parse_args()
    if options.what == "rows":
        make_rows(options.place, options.rows, options.validation, options.kind, options.seed)
    elif options.what == "areas":
        print(areas(options.place, options.runs))
    else:
        for run in options.runs:
            print(kept(options.place, run))


if __name__ == "__main__":
    main()

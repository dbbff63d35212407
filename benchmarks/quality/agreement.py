"""How far short fine-tunes order masks as whole ones do: rank correlation, the pick, and pairs that differ for certain."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.noise import ranks

RECORD = Path(__file__).with_name("whole.csv")
BEST = 3


@dataclass(frozen=True, slots=True)
class Whole:
    """Whole fine-tunes on one mask: mean ``loss`` over seeds, nats per token, and its ``spread``, half the range."""

    loss: float
    spread: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """``masks`` in both; ``correlation`` of ranks; ``place`` of the pick among the whole fine-tunes, from 1.

    ``pairs`` that differ by more than the spread of either, and how many of them are ordered ``rightly``.
    """

    masks: int
    correlation: float
    place: int
    pairs: int
    rightly: int

    def __str__(self) -> str:
        return f"{self.masks} | {self.correlation:.2f} | {self.place} | {self.rightly} of {self.pairs}"


HEAD = "masks | rank correlation | the pick is number | pairs ordered rightly"


def record(column: str, file: Path = RECORD) -> dict[str, Whole]:
    """The whole fine-tunes of 216 rows of code that are on record, by mask; ``column``: of the held-out rows.

    Of a mask with one seed the spread is the mean of those that have several.
    """
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    spreads = [float(row[f"{column}_spread"]) for row in rows if row[f"{column}_spread"]]
    usual = sum(spreads) / len(spreads)
    return {row["mask"]: Whole(float(row[column]), float(row[f"{column}_spread"] or usual)) for row in rows}


def agreement(short: Mapping[str, float], whole: Mapping[str, Whole]) -> Agreement:
    """Over the masks that both have; ``short``: mask -> mean loss over seeds. Raises ValueError for fewer than three."""
    names = [name for name in whole if name in short]
    if len(names) < 3:
        raise ValueError(f"{len(names)} masks are in both: at least three are needed")
    ours, theirs = (np.array(column) for column in zip(*((short[n], whole[n].loss) for n in names), strict=True))
    pick = min(names, key=lambda name: short[name])
    pairs = rightly = 0
    for one, other in itertools.combinations(names, 2):
        apart = whole[one].loss - whole[other].loss
        if abs(apart) > max(whole[one].spread, whole[other].spread):
            pairs += 1
            rightly += (short[one] - short[other]) * apart > 0
    place = 1 + sum(whole[name].loss < whole[pick].loss for name in names)
    return Agreement(len(names), float(np.corrcoef(ranks(ours), ranks(theirs))[0, 1]), place, pairs, rightly)


def mean_by_name(found: Sequence[Mapping[str, Any]], column: str) -> dict[str, float]:
    """Name -> mean of ``column`` over the lines of that name."""
    columns: dict[str, list[float]] = {}
    for line in found:
        columns.setdefault(str(line["name"]), []).append(float(line[column]))
    return {name: sum(values) / len(values) for name, values in columns.items()}

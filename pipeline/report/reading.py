"""One way through a run: what was prepared, its scores, and what every mask keeps, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from alphatoken.data_schemas import KEPT
from alphatoken.pipeline.mask.comparison import kept_in_part
from alphatoken.pipeline.mask.layout import require_shards
from alphatoken.pipeline.mask.paired_rows import PairedParts, PairedRows
from alphatoken.pipeline.mask.rehearsed import is_rehearsed
from alphatoken.pipeline.maths.masking import Bools, Floats
from alphatoken.pipeline.report.shown_masks import ShownMask, values_of
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.remedies import mask_again
from alphatoken.pipeline.run.run import Run

ROWS_AT_ONCE = 1024  # a divisor of the rows of a row group, so that masks, which are read by themselves, are cut alike


@dataclass(frozen=True, slots=True)
class BranchRows:
    """Of pairs one branch. ``scores``: name -> ``(response tokens,)``; ``kept``: one per mask, ``(response tokens,)``.

    ``ranked``: one per mask, what it compared within groups of examples, ``(response tokens,)``; None where it did not, or
    where the groups cannot be told from these rows.
    """

    rows: PairedRows
    scores: dict[str, Floats]
    kept: tuple[Bools, ...]
    ranked: tuple[Floats | None, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive rows from number ``first`` on (counted over the run).

    ``sources``: where each was read from. ``masks``: those that the lists of each branch speak of.
    """

    first: int
    branches: tuple[BranchRows, ...]
    sources: pa.ChunkedArray
    masks: tuple[ShownMask, ...]

    def __len__(self) -> int:
        return len(self.sources)


class Reading:
    """Raises RunFailed for parts that are missing, damaged or do not belong together."""

    def __init__(self, run: Run, masks: Sequence[ShownMask]) -> None:
        self.run, self.masks = run, tuple(masks)
        self.branches = tuple(masks[0].places)
        inputs = values_of(run)
        there = [*inputs.get("columns", []), *([KEPT] if inputs and is_rehearsed(inputs) else [])]
        self.columns = [name for name in there if name != KEPT]
        seed = run.settings.run.seed
        self.parts = {branch: PairedParts(run, ROWS_AT_ONCE, there, seed, branch) for branch in self.branches}
        self.rows: dict[str, int] = next(iter(self.parts.values())).rows
        self._check()

    @property
    def scores(self) -> list[str]:
        """Every score by its name: the columns of values/, then what masks make of them."""
        made = [mask.score for mask in self.masks if mask.score is not None and mask.values]
        return [*self.columns, *dict.fromkeys(made)]

    @property
    def total(self) -> int:
        """Rows of the run."""
        return sum(self.rows.values())

    def all(self) -> Iterator[Batch]:
        """Every row once, in order."""
        first = 0
        for part in self.rows:
            for batch in self.part(part, first):
                yield batch
                first += len(batch)

    def part(self, part: str, first: int = 0) -> Iterator[Batch]:
        """The rows of one part; ``first``: the number of its first."""
        one = next(iter(self.parts.values()))
        sources = one.tables(f"prepared/{part}", one.prepared, ["source"], "prepare")
        branches = [self._branch(part, branch) for branch in self.branches]
        for table, *found in zip(sources, *branches, strict=True):
            yield Batch(first, tuple(found), table["source"], self.masks)
            first += table.num_rows

    def _branch(self, part: str, branch: str) -> Iterator[BranchRows]:
        kept = [kept_in_part(mask.places[branch], part, ROWS_AT_ONCE) for mask in self.masks]
        for rows in self.parts[branch].part(part, self.columns, with_input_ids=True):
            own = tuple(next(one)[rows.response] for one in kept)
            ranked = tuple(_ranked(mask, branch, rows) for mask in self.masks)
            yield BranchRows(rows, self._scores(rows, branch), own, ranked)

    def _scores(self, rows: PairedRows, branch: str) -> dict[str, Floats]:
        found = dict(rows.components)
        for mask in self.masks:
            if mask.score is not None and mask.score not in found:
                found[mask.score] = mask.values[branch].values(rows)
        return found

    def _check(self) -> None:
        """Every mask has every row of every part."""
        for mask in self.masks:
            require_shards(self.run.storage, mask.name)
            fingerprint = self.run.manifest.stage(f"mask/{mask.name}")["fingerprint"]
            for part, rows in self.rows.items():
                name = next(iter(mask.places.values())).file(part)
                if self.run.storage.rows_of(name, fingerprint) != rows:
                    raise RunFailed(
                        f"{name} is missing, damaged or of another run: {mask_again(self.run.storage.place, mask.name)}"
                    )


def _ranked(mask: ShownMask, branch: str, rows: PairedRows) -> Floats | None:
    """Of masks whose groups end where these rows do: mask.scope=example, and batch of most sizes."""
    if mask.grouped is None or ROWS_AT_ONCE % mask.grouped:
        return None
    return mask.ranked[branch].ranked(rows)


def lengths_of(rows: PairedRows) -> np.ndarray:
    """Response tokens of each example, ``(examples,)``."""
    return np.diff(rows.offsets)

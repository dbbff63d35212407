"""A sample of all tokens' scores, taken before the one pass over everything: ranges, ranks and correlations come from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from alphatoken.pipeline.maths.masking import Floats
from alphatoken.pipeline.report.reading import Reading

ROWS, TOKENS = 65_536, 400_000  # at most this many rows are looked at, and about this many tokens are held
QUANTILES = 200  # steps between the lowest and the highest score, for the rank of a token


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one branch. ``scores``: name -> ``(sampled tokens,)``. ``whole``: whether no token was left out."""

    scores: dict[str, Floats]
    whole: bool

    @property
    def tokens(self) -> int:
        """How many were sampled."""
        return len(next(iter(self.scores.values()))) if self.scores else 0

    def quantiles(self, name: str) -> npt.NDArray[np.float64]:
        """``(QUANTILES + 1,)``, ascending, from the lowest to the highest."""
        values = self.scores[name].astype(np.float64)
        return np.quantile(values, np.linspace(0, 1, QUANTILES + 1)) if len(values) else np.zeros(QUANTILES + 1)

    def correlations(self) -> dict[tuple[str, str], float]:
        """Rank correlation (Spearman) of every two scores that are not the same for all tokens, -1 to 1."""
        ranks = {name: _ranks(values) for name, values in self.scores.items()}
        ranks = {name: found for name, found in ranks.items() if found.any()}
        return {(a, b): float(np.clip(np.mean(ranks[a] * ranks[b]), -1, 1)) for a, b in combinations(ranks, 2)}


def take_samples(reading: Reading) -> dict[str, Sample]:
    """Branch -> its sample: tokens at equal distances of parts at equal distances."""
    chosen, rows = _some_parts(reading)
    taken: dict[str, dict[str, list[Floats]]] = {b: {name: [] for name in reading.scores} for b in reading.branches}
    step = {branch: max(1, round(_tokens(reading, branch) * rows / max(1, reading.total) / TOKENS)) for branch in taken}
    for part in chosen:
        seen = 0
        for batch in reading.part(part):
            for branch, found in zip(reading.branches, batch.branches, strict=True):
                for name, own in taken[branch].items():
                    own.append(found.scores[name][:: step[branch]].copy())
            seen += len(batch)
            if seen >= ROWS:
                break
    whole = {branch: rows == reading.total and step[branch] == 1 for branch in taken}
    empty = np.zeros(0, np.float32)
    return {
        branch: Sample({name: np.concatenate([empty, *own]) for name, own in scores.items()}, whole[branch])
        for branch, scores in taken.items()
    }


def _some_parts(reading: Reading) -> tuple[Sequence[str], int]:
    """Parts with about ROWS rows together, and how many of their rows are looked at."""
    parts = [part for part, rows in reading.rows.items() if rows]
    if not parts or not reading.scores:
        return [], 0
    wanted = min(len(parts), max(1, ROWS * len(parts) // reading.total))
    chosen = [parts[index * len(parts) // wanted] for index in range(wanted)]
    return chosen, sum(min(reading.rows[part], -(-ROWS // 1024) * 1024) for part in chosen)


def _tokens(reading: Reading, branch: str) -> int:
    found: int = reading.masks[0].summaries[branch]["response_tokens"]
    return found


def _ranks(values: Floats) -> npt.NDArray[np.float64]:
    """Ranks with mean 0 and mean square 1, equal values sharing theirs; zeros where all are the same."""
    if not len(values):
        return np.zeros(0)
    low, high = (pc.rank(pa.array(values), tiebreaker=tie).to_numpy() for tie in ("min", "max"))
    ranks = (low.astype(np.float64) + high) / 2
    ranks -= ranks.mean()
    spread = float(np.sqrt(np.square(ranks).mean()))
    return ranks / spread if spread else np.zeros(len(values))

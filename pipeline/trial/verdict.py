"""What the numbers of a trial say: means, differences that are paired by seed, and one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alphatoken.pipeline.trial.candidates import FIRST, FULL, UNTOUCHED, random_name

SUMMARY = "trial/summary.json"
SEEN = "measured on rows that also made the directions"


@dataclass(frozen=True, slots=True)
class Measured:
    """One finished fine-tune. ``row_losses``, ``row_tokens``: of every held-out row; of pairs the loss of each, and 1.

    ``retention_loss``: where there is data.retention; ``margin``, ``reward_accuracy``: of held-out pairs.
    """

    candidate: str
    kind: str
    seed: int
    kept_fraction: float
    trained_tokens: int
    adaptation: float | None
    retention: float | None
    row_losses: Sequence[float]
    row_tokens: Sequence[int]
    failed: str | None
    retention_loss: float | None = None
    margin: float | None = None
    reward_accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two candidates' losses on the same seeds: ``mean``, nats per token, of pairs per pair; below 0: the first is lower.

    ``spread``: the larger of half the range over seeds and two standard errors over held-out rows; None with one seed.
    ``exceeds``: whether the mean is larger than the spread and of one sign at all seeds.
    """

    mean: float
    spread: float | None
    exceeds: bool


@dataclass(frozen=True, slots=True)
class Line:
    """One candidate. ``adaptation``, ``retention``: mean over seeds and half the range; ``to_full``, ``to_random``: Differences
    of adaptation, ``moved``: of retention to full; None where there is nothing to compare with. ``retention_loss``,
    ``margin``, ``reward_accuracy``: mean and half the range, None where they were not measured.
    """

    name: str
    kind: str
    kept_fraction: float
    seeds: int
    adaptation: tuple[float, float]
    retention: tuple[float, float]
    to_full: Difference | None
    to_random: Difference | None
    moved: Difference | None
    retention_loss: tuple[float, float] | None = None
    margin: tuple[float, float] | None = None
    reward_accuracy: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """``lines``: sorted by adaptation. ``winner``: a mask, `full` or `full but first tokens`; ``failed``: fine-tunes that were
    left out, with the reason.
    """

    lines: tuple[Line, ...]
    winner: str
    sentence: str
    failed: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For trial/summary.json."""
        return asdict(self)


def judge(
    found: Sequence[Measured], beside: Mapping[str, int], seen: bool, pairs: bool = False, caveat: str = ""
) -> Verdict:
    """``found``: all fine-tunes; ``beside``: candidate -> percent of the random mask beside it; ``seen``: see rows.HeldOut; ``pairs``:
    whether losses are of preference pairs; ``caveat``: what is to be said of a winner.

    Raises ValueError where full has no numbers.
    """
    failed = tuple(f"{m.candidate}, seed {m.seed}: {m.failed}" for m in found if m.failed)
    by_name: dict[str, dict[int, Measured]] = {}
    for one in found:
        if not one.failed:
            by_name.setdefault(one.candidate, {})[one.seed] = one
    if FULL not in by_name:
        raise ValueError("full has no numbers")
    lines = [_line(name, by_name, beside) for name in by_name]
    lines.sort(key=lambda line: line.adaptation[0])
    several = len({one.seed for one in found}) > 1
    winner, sentence = _sentence(lines, "nats per pair" if pairs else "nats per token", several)
    if caveat and winner != FULL:
        sentence += f"; {caveat}"
    return Verdict(tuple(lines), winner, f"{sentence} ({SEEN})." if seen else f"{sentence}.", failed)


def _line(name: str, by_name: Mapping[str, Mapping[int, Measured]], beside: Mapping[str, int]) -> Line:
    own = by_name[name]
    one = next(iter(own.values()))
    adaptation, retention = ([getattr(m, key) for m in own.values()] for key in ("adaptation", "retention"))
    others = [[getattr(m, key) for m in own.values()] for key in ("retention_loss", "margin", "reward_accuracy")]
    other = random_name(beside[name])
    trained = name not in (FULL, UNTOUCHED)
    return Line(
        name, one.kind, one.kept_fraction, len(own), _mean_and_half_range(adaptation), _mean_and_half_range(retention),
        difference(own, by_name[FULL]) if trained else None,
        difference(own, by_name[other]) if trained and other != name and other in by_name else None,
        _moved(own, by_name[FULL]) if trained else None,
        *[None if None in numbers else _mean_and_half_range(numbers) for numbers in others],
    )  # fmt: skip


def difference(one: Mapping[int, Measured], other: Mapping[int, Measured]) -> Difference | None:
    """Adaptation of ``one`` less that of ``other`` over the seeds that both have; None where they share none."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    tokens = np.array(one[seeds[0]].row_tokens, np.float64)
    gaps = np.array([np.subtract(one[s].row_losses, other[s].row_losses) for s in seeds])
    of_seeds = gaps.sum(axis=1) / tokens.sum()
    return _difference(of_seeds, 2 * row_error(gaps.mean(axis=0), tokens))


def row_error(gaps: np.ndarray, tokens: np.ndarray) -> float:
    """Standard error of sum(gaps) / sum(tokens) over rows, had others been drawn; ``(rows,)`` both."""
    rows = len(gaps)
    mean = gaps.sum() / tokens.sum()
    return float(np.sqrt(rows / (rows - 1) * np.square(gaps - mean * tokens).sum()) / tokens.sum())


def _moved(one: Mapping[int, Measured], other: Mapping[int, Measured]) -> Difference | None:
    seeds = sorted(one.keys() & other.keys())
    gaps = [(one[s].retention or 0.0) - (other[s].retention or 0.0) for s in seeds]
    return _difference(np.array(gaps), 0.0) if seeds else None


def _difference(of_seeds: np.ndarray, error: float) -> Difference:
    mean = float(of_seeds.mean())
    if len(of_seeds) == 1:
        return Difference(mean, None, False)
    spread = max(float(np.ptp(of_seeds)) / 2, error)
    one_sign = bool((of_seeds < 0).all() or (of_seeds > 0).all())
    return Difference(mean, spread, one_sign and abs(mean) > spread)


def _mean_and_half_range(numbers: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(numbers)), float(np.ptp(numbers)) / 2


def _sentence(lines: Sequence[Line], unit: str, several: bool) -> tuple[str, str]:
    """The winner, and what to do, without the full stop; ``unit``: of adaptation; ``several``: whether there were several seeds."""
    own = {line.name: line for line in lines}
    full = own[FULL]
    tried = [line for line in lines if line.kind in ("mask", "first")]
    if full.seeds > 1:  # one of which a single fine-tune has numbers says nothing
        tried = [line for line in tried if line.to_full and line.to_full.spread is not None]
    better = [line for line in tried if line.to_full and line.to_full.exceeds and line.to_full.mean < 0]
    if several and not any(line.to_full and line.to_full.spread is not None for line in tried):
        return FULL, "Too few fine-tunes have numbers to judge any mask by; try a smaller trial.learning_rate"
    untouched = own.get(UNTOUCHED)
    if untouched and full.adaptation[0] >= untouched.adaptation[0] and not better:
        return FULL, (
            f"Training does not help at all: on everything it ends at {full.adaptation[0]:.4f} {unit}, where the "
            f"untouched model is at {untouched.adaptation[0]:.4f}; try a smaller trial.learning_rate, or other data"
        )
    if better:
        best = min(better, key=_from_full)
        assert best.to_full
        text = (
            f"Train on {_called(best)}: it ends {-best.to_full.mean:.4f} ± {best.to_full.spread:.4f} {unit} below "
            "training on everything"
        )
        if best.to_random is None:
            return best.name, text
        if best.to_random.exceeds and best.to_random.mean < 0:
            return (
                best.name,
                f"{text}, and {-best.to_random.mean:.4f} ± {best.to_random.spread:.4f} below a random mask of its size",
            )
        return best.name, f"{text}, though a random mask of its size does as well within the spread"
    text = "No mask beats training on everything"
    nearest = min((line for line in tried if line.to_full), key=_from_full, default=None)
    if nearest is not None and nearest.to_full:
        gap, best_one = nearest.to_full, _called(nearest)
        if gap.spread is None:
            text = (
                f"One seed cannot judge: the best, {best_one}, ends {gap.mean:+.4f} {unit} from training on everything"
            )
            return FULL, f"{text}; trial.seeds=3 can"
        text += f": the best, {best_one}, ends {gap.mean:+.4f} ± {gap.spread:.4f} {unit} from it"
    gentle = [
        line
        for line in tried
        if line.to_full and not line.to_full.exceeds and line.moved and line.moved.exceeds and line.moved.mean < 0
    ]
    if gentle:
        mildest = min(gentle, key=lambda line: line.retention[0])
        text += (
            f"; {_called(mildest)} learns as much within the spread and moves the model less (divergence from the reference "
            f"{mildest.retention[0]:.4f} against {full.retention[0]:.4f})"
        )
    return FULL, text


def _from_full(line: Line) -> float:
    """Paired by seed, as means over the seeds are not where a fine-tune of one candidate has failed."""
    return line.to_full.mean if line.to_full else 0.0


def _called(line: Line) -> str:
    return "everything but the first token of each response" if line.name == FIRST else f"mask {line.name}"

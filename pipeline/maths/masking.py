"""From token values to kept tokens: exact order statistics of a stream in bounded memory.

numpy alone, so that masks can be made again and again where there is no torch. Arrays called *flat* hold the response
tokens of several examples laid end to end; ``offsets`` ``(examples + 1,)`` says where each example begins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

RANDOM = "random"  # a column that is drawn where it is read; see uniform.py
_SIGN = np.uint32(1 << 31)
_HALF = 1 << 16


def score_of(columns: Mapping[str, Floats], score: str, per_norm: bool = False) -> npt.NDArray[np.float64]:
    """What mask.score puts first, before stability and loss: ``(tokens,)`` float64, higher is better.

    paper: adaptation, direct plus causal. exact: adaptation of the token's own loss. unrolled: at
    the token's own steps of a simulated run. information, entropy, random: their
    column. loss: minus the loss. excess_loss: the policy's loss less the reference's. full: 0. ``per_norm``: see
    ``per_gradient_norm``.
    """
    if score == "paper":
        found = objective_value(columns, "adaptation")
    elif score in ("exact", "unrolled"):
        found = columns[f"adaptation_{score}"].astype(np.float64)
    elif score == "loss":
        found = -columns["loss"].astype(np.float64)
    elif score == "excess_loss":
        found = columns["loss"].astype(np.float64) - columns["reference_loss"]
    elif score == "full":
        found = np.zeros(len(next(iter(columns.values()))), np.float64)
    else:
        found = columns[score].astype(np.float64)
    return per_gradient_norm(found, columns) if per_norm else found


def objective_value(
    columns: Mapping[str, Floats], objective: str, per_norm: bool = False, score: str = "paper"
) -> npt.NDArray[np.float64]:
    """Direct plus causal along one direction, ``(tokens,)`` float64: adaptation, adaptation_<task> or retention; with ``score``
    unrolled its value at the token's own steps of a simulated run."""
    if score == "unrolled":
        found = columns[f"{objective}_unrolled"].astype(np.float64)
    else:
        found = columns[f"{objective}_direct"].astype(np.float64) + columns[f"{objective}_causal"]
    return per_gradient_norm(found, columns) if per_norm else found


def stability_of(columns: Mapping[str, Floats], score: str, per_norm: bool = False) -> npt.NDArray[np.float64]:
    """Stability, ``(tokens,)`` float64: direct plus causal, of mask.score=exact that of the token's own loss."""
    alone = score in ("exact", "unrolled")
    found = columns[f"stability_{score}"].astype(np.float64) if alone else objective_value(columns, "stability")
    return per_gradient_norm(found, columns) if per_norm else found


def per_gradient_norm(found: npt.NDArray[np.float64], columns: Mapping[str, Floats]) -> npt.NDArray[np.float64]:
    """Divided by the token's ``gradient_norm``, and 0 where that is 0: a token without a gradient teaches nothing."""
    norms = columns["gradient_norm"].astype(np.float64)
    return np.divide(found, norms, out=np.zeros_like(found), where=norms > 0)


def token_values(
    columns: Mapping[str, Floats],
    score: str,
    weight: float,
    scale: Mapping[str, float],
    loss_weight: float = 0.0,
    per_norm: bool = False,
    objectives: Mapping[str, float] | None = None,
) -> Floats:
    """The value of every token (Eq. 12), ``(tokens,)`` float32; higher is better.

    ``value = score / scale["score"] + weight * stability / scale["stability"] - loss_weight * loss / scale["loss"]``. With
    ``score`` paper the first two terms are the paper's. The last one is not: it takes the token's own loss as a second
    criterion, against tokens that are simply wrong. Columns and scales of terms whose weight is 0 are not needed.
    ``objectives``: direction -> weight: instead of the score, the sum of weight * value / scale[direction] over them.
    ``per_norm``: score and stability (not the loss) are those per unit of the token's gradient norm. Computed in float64
    and rounded once, so that the order of equal sums does not depend on how they were added up. A result beyond float32
    becomes infinite.
    """
    objectives = objectives or {}
    needed = list(objectives or ["score"]) + ["stability"] * bool(weight) + ["loss"] * bool(loss_weight)
    if not all(0 < scale[name] < math.inf for name in needed):
        raise ValueError(f"scales must be positive and finite, not {dict(scale)}")
    if objectives:
        parts = [w * objective_value(columns, name, per_norm, score) / scale[name] for name, w in objectives.items()]
        value = np.sum(parts, axis=0)
    else:
        value = score_of(columns, score, per_norm) / scale["score"]
    if weight:
        value += weight * stability_of(columns, score, per_norm) / scale["stability"]
    if loss_weight:
        value -= loss_weight * columns["loss"].astype(np.float64) / scale["loss"]
    with np.errstate(over="ignore"):
        return value.astype(np.float32)


def rank_of(rho: float, n: int) -> int:
    """How many of ``n`` tokens a fraction ``rho`` is: ``ceil(rho * n)``, at least 1.

    ``rho`` is taken as the decimal number that was typed: in floats ``0.7 * 10`` is a little above 7.
    """
    if not 0 < rho <= 1 or n < 1:
        raise ValueError(f"need 0 < rho <= 1 and at least one token, not rho={rho}, n={n}")
    return min(n, math.ceil(Fraction(repr(float(rho))) * n))


def threshold_of(values: Floats, rho: float) -> np.float32:
    """The threshold of one group (Eq. 13): its ``ceil(rho * n)``-th largest value.

    Keep ``values >= threshold``; ties at the threshold are all kept. Raises ValueError for an empty group or a NaN.
    """
    if np.isnan(values).any():
        raise ValueError("NaN has no rank")
    place = len(values) - rank_of(rho, len(values))
    return np.float32(np.partition(values, place)[place])


def thresholds_in_groups(values: Floats, offsets: Ints, size: int, rho: float) -> tuple[Floats, Floats]:
    """Thresholds of groups of ``size`` consecutive examples; the last group may be smaller.

    ``values``: flat. Returns one threshold per token, and one per group that has any token.
    """
    examples = len(offsets) - 1
    borders = offsets[np.append(np.arange(0, examples, size), examples)]
    borders = borders[np.append(True, np.diff(borders) > 0)]  # groups without a token have no threshold
    pairs = zip(borders[:-1], borders[1:], strict=True)
    groups = np.array([threshold_of(values[start:stop], rho) for start, stop in pairs], np.float32)
    return np.repeat(groups, np.diff(borders)), groups


@dataclass(frozen=True, slots=True)
class SparseCounts:
    """An array of counts, of most of which nothing was counted, small enough to be sent to another process.

    ``places``: of those that are not 0, in the array laid flat.
    """

    places: Ints
    numbers: Ints

    @classmethod
    def of(cls, counts: Ints) -> SparseCounts:
        """Of an array of any shape."""
        flat = counts.reshape(-1)
        places = np.flatnonzero(flat)
        return cls(places, flat[places])

    def add_to(self, counts: Ints) -> None:
        """Add to an array of the shape that they were taken of."""
        counts.reshape(-1)[self.places] += self.numbers


class RankSelect:
    """The exact k-th largest float32 of a stream that can be read twice; 1 MiB, whatever the length of the stream.

    A float32 becomes a uint32 of the same order. The first pass counts the upper 16 bits, which tells the bin that
    holds the k-th largest; the second counts the lower 16 bits within that bin. -0.0 equals 0.0; NaN raises ValueError.

        select = RankSelect()
        for values in stream: select.count(values)
        select.choose(rank_of(rho, select.total))
        for values in stream: select.refine(values)
        threshold = select.threshold()
    """

    def __init__(self) -> None:
        self._high = np.zeros(_HALF, np.int64)
        self._low = np.zeros(_HALF, np.int64)
        self._bin = -1
        self._rank = 0

    def __getstate__(self) -> tuple[int, int, SparseCounts, SparseCounts]:
        return self._bin, self._rank, SparseCounts.of(self._high), SparseCounts.of(self._low)

    def __setstate__(self, state: tuple[int, int, SparseCounts, SparseCounts]) -> None:
        self.__init__()  # type: ignore[misc]  # the arrays of nothing counted
        self._bin, self._rank, high, low = state
        high.add_to(self._high)
        low.add_to(self._low)

    @property
    def total(self) -> int:
        """Values counted in the first pass."""
        return int(self._high.sum())

    @property
    def bin(self) -> int:
        """Of the chosen upper halves; -1 during the first pass."""
        return self._bin

    def blank(self) -> RankSelect:
        """One that counts the same in the present pass, and has counted nothing yet."""
        other = RankSelect()
        other._bin = self._bin
        return other

    def counted(self) -> SparseCounts:
        """What was counted in the present pass."""
        return SparseCounts.of(self._high if self._bin < 0 else self._low)

    def add(self, counted: SparseCounts) -> None:
        """Take in what another one counted in the present pass."""
        counted.add_to(self._high if self._bin < 0 else self._low)

    def count(self, values: Floats) -> None:
        """First pass."""
        self.see_keys(order_keys(values))

    def see_keys(self, keys: npt.NDArray[np.uint32]) -> None:
        """``count`` or ``refine``, whichever the present pass is, of values whose ``order_keys`` are known already."""
        if self._bin < 0:
            self._high += np.bincount(keys >> 16, minlength=_HALF)
        else:
            self._low += np.bincount(keys[(keys >> 16) == self._bin] & (_HALF - 1), minlength=_HALF)

    def choose(self, k: int) -> np.float32:
        """End the first pass. Returns the smallest value of the chosen bin: the k-th largest to about 8 bits."""
        if not 1 <= k <= self.total:
            raise ValueError(f"there is no {k}-th largest of {self.total} values")
        self._bin, self._rank = _from_above(self._high, k)
        return _value(self._bin << 16)

    def refine(self, values: Floats) -> None:
        """Second pass, over the same values."""
        self.see_keys(order_keys(values))

    def threshold(self) -> np.float32:
        """The k-th largest value; raises ValueError when the second pass saw other values than the first."""
        if self._bin < 0 or self._low.sum() != self._high[self._bin]:
            raise ValueError("the second pass did not see the values of the first")
        low, _ = _from_above(self._low, self._rank)
        return _value(self._bin << 16 | low)


def keep(values: Floats, response: Bools, threshold: float, always: Bools, min_kept: int) -> Bools:
    """Which tokens of one example are kept (Eq. 13), ``(length,)``.

    Response tokens with ``value >= threshold``, and response tokens in ``always``. If these are fewer than
    ``min_kept``, the highest-valued other response tokens are added, the earlier of equal ones first.
    """
    kept = np.zeros(len(values), np.bool_)
    inside = values[response]
    offsets = np.array([0, len(inside)])
    kept[response] = keep_flat(inside, offsets, np.float32(threshold), always[response], min_kept)
    return kept


def sums_by_row(numbers: npt.NDArray[Any], offsets: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The sum over ``numbers[offsets[i]:offsets[i + 1]]`` of every row i; of flags how many are set."""
    reached = np.zeros(len(numbers) + 1, np.cumsum(numbers[:0]).dtype)
    np.cumsum(numbers, out=reached[1:])
    return np.diff(reached[offsets])


def keep_flat(
    values: Floats,
    offsets: Ints,
    threshold: np.float32 | Floats,
    always: Bools,
    min_kept: int | Ints,
    never: Bools | None = None,
) -> Bools:
    """``keep`` for the response tokens of many examples; ``threshold`` is one number or one per token, ``min_kept`` one number
    or one per example. ``never``: tokens that are not added either, so that fewer may be kept.
    """
    kept = (values >= threshold) | always
    missing = np.minimum(min_kept, np.diff(offsets)) - sums_by_row(kept, offsets)
    for example in np.flatnonzero(missing > 0):
        start, stop = offsets[example], offsets[example + 1]
        free = ~kept[start:stop] if never is None else ~(kept | never)[start:stop]
        others = start + np.flatnonzero(free)
        best = np.argsort(-values[others], kind="stable")[: missing[example]]
        kept[others[best]] = True
    return kept


def order_keys(values: Floats) -> npt.NDArray[np.uint32]:
    """uint32 numbers in the order of the floats; -0.0 as 0.0. Raises ValueError for NaN."""
    if values.dtype != np.float32:
        raise TypeError(f"values must be float32, not {values.dtype}")
    if np.isnan(values).any():
        raise ValueError("NaN has no rank")
    bits = (values + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
    # Negative floats grow in magnitude with their bits: invert them all, so that the most negative comes first.
    flips = (bits.view(np.int32) >> 31).view(np.uint32)
    flips |= _SIGN
    flips ^= bits
    return flips


def float_of_key(keys: npt.NDArray[np.uint32]) -> Floats:
    """The floats whose ``order_keys`` these are."""
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).view(np.float32)


def _value(key: int) -> np.float32:
    """The float of one key."""
    return float_of_key(np.array([key], np.uint32))[0]


def _from_above(counts: Ints, k: int) -> tuple[int, int]:
    """The bin of the k-th largest, and its rank from above within that bin."""
    reached = np.cumsum(counts[::-1])
    steps = int(np.searchsorted(reached, k))
    place = len(counts) - 1 - steps
    return place, k - int(reached[steps] - counts[place])

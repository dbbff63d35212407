"""mask.rule=weight: a soft weight per token in place of kept or not, a ramp in the rank of the value.

Within a group of n tokens (the data set, one token id, one batch or one example, as mask.scope says) let x be the
place in the order of values, 0 above the highest and n below the lowest. The ramp is

    ramp(x) = clip((rho + h - x / n) / (2 h), 0, 1)      with  h = min(rho, 1 - rho)

the widest straight line that falls from 1 to 0, is 1/2 where the hard threshold would stand (x = rho n) and fits into
the group: at rho = 0.5 it falls over the whole group, at rho = 0.3 from the highest value to rank 0.6 n. Ranks rather
than values, since values have heavy tails and no unit; a straight line, since nothing is known that would favour
another shape; the widest, since a width would be one more number to choose, and the narrowest is mask.rule=top. Its
mean over the group is rho, so a trainer that divides by the sum of weights or by the number of tokens sees what it
would see of a hard mask of the same rho.

The ramp is cut into STEPS steps of equal width in rank, with exact order statistics as borders, so that memory depends
on the groups alone. All tokens of a step weigh the mean of the ramp over the ranks that they take up: equal values
weigh the same, and the mean stays rho to rounding whatever the ties. numpy alone.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.maths.masking import Floats, Ints

STEPS = 16


def border_ranks(rho: float, sizes: Ints) -> Ints:
    """Ranks from above of the values that border the steps, (groups, STEPS + 1), for groups of ``sizes`` tokens."""
    exact = Fraction(repr(float(rho)))
    half = min(exact, 1 - exact)
    places = [exact - half + 2 * half * step / STEPS for step in range(STEPS + 1)]
    return np.array([[max(1, math.ceil(place * int(size))) for place in places] for size in sizes], np.int64)


def steps_of(values: Floats, groups: Ints, borders: Floats) -> Ints:
    """The step of every token, ``(tokens,)``: how many of its group's ``borders`` (groups, n) lie above its value."""
    steps = np.zeros(len(values), np.int64)
    for place in range(borders.shape[1]):
        steps += values < borders[groups, place]
    return steps


def count_steps(steps: Ints, groups: Ints, counts: Ints) -> None:
    """Add the tokens to ``counts`` (groups, STEPS + 2)."""
    np.add.at(counts, (groups, steps), 1)


def step_weights(rho: float, counts: Ints) -> Floats:
    """The weight of every step, of the shape of ``counts`` (groups, STEPS + 2); 0.0 for steps without a token."""
    ends = np.cumsum(counts, axis=1).astype(np.float64)
    sizes = ends[:, -1:]
    area = _area(rho, np.concatenate([np.zeros_like(sizes), ends], axis=1) / sizes) * sizes
    means = np.diff(area, axis=1) / np.maximum(counts, 1)
    return np.clip(means, 0.0, 1.0).astype(np.float32)


def _area(rho: float, place: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The ramp's integral from 0 to ``place``, both as fractions of the group."""
    half = min(rho, 1 - rho)
    full = np.minimum(place, rho - half)
    inside = np.clip(place - (rho - half), 0.0, 2 * half)
    return full + (inside - np.square(inside) / (4 * half) if half else 0.0)

"""Sums of floats that are the same number in whatever order, and in however many pieces, they are added up."""

from __future__ import annotations

from fractions import Fraction

_PLACES = 1074  # binary places of the smallest float64 above 0


class ExactSum:
    """A sum of finite float64 numbers, kept as a whole number of the smallest of them and rounded once, when it is asked for.

    A kilobit of memory for a sum; an addition takes a microsecond, so that it is for sums of batches, not of tokens.
    """

    __slots__ = ("_units",)

    def __init__(self) -> None:
        self._units = 0

    def add(self, number: float) -> None:
        """Raises OverflowError or ValueError for infinity and NaN."""
        top, bottom = float(number).as_integer_ratio()
        self._units += top << (_PLACES - bottom.bit_length() + 1)

    def merge(self, other: ExactSum) -> None:
        """Add another sum."""
        self._units += other._units

    def __float__(self) -> float:
        return float(Fraction(self._units, 1 << _PLACES))

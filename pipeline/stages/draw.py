"""Seeded draws without replacement over any number of rows, in memory of what is drawn."""

import random
from collections.abc import Iterator


def draw_order(rows: int, seed: int) -> Iterator[int]:
    """A uniformly random permutation of range(rows), lazily (Fisher-Yates over a sparse array)."""
    generator = random.Random(seed)
    moved: dict[int, int] = {}
    for index in range(rows):
        other = generator.randrange(index, rows)
        yield moved.get(other, other)
        moved[other] = moved.get(index, index)

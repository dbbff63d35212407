"""Seeded draws without replacement over any number of rows, in memory of what is drawn."""

import random
from collections.abc import Iterator, Sequence


def draw_order(rows: int, seed: int) -> Iterator[int]:
    """A uniformly random permutation of range(rows), lazily (Fisher-Yates over a sparse array)."""
    generator = random.Random(seed)
    moved: dict[int, int] = {}
    for index in range(rows):
        other = generator.randrange(index, rows)
        yield moved.get(other, other)
        moved[other] = moved.get(index, index)


def drawn_rows(rows: int, wanted: int, seed: int) -> list[int]:
    """``wanted`` of ``range(rows)``, or all where there are fewer, in order: on what a warm-up or an unrolled run trains."""
    return sorted(random.Random(seed).sample(range(rows), min(wanted, rows)))


LEAST_TO_CUT = 8  # validation rows: with fewer, neither half would say anything


def halves(rows: int, seed: int) -> tuple[list[int], list[int]]:
    """``range(rows)`` of validation rows cut in two by the seed: those that make directions, and those of a trial.

    The second is empty where there are fewer than LEAST_TO_CUT.
    """
    if rows < LEAST_TO_CUT:
        return list(range(rows)), []
    return part_of(range(rows), seed, 0, 2), part_of(range(rows), seed, 1, 2)


def part_of(rows: Sequence[int], seed: int, index: int, parts: int) -> list[int]:
    """The ``index``-th of ``parts`` disjoint parts that together are ``rows``, in the order of ``rows``.

    Drawn with the seed, so that each part is a sample of all rows however they are sorted; sizes differ by one at most.
    """
    shuffled = list(rows)
    random.Random(f"{seed} parts").shuffle(shuffled)
    own = set(shuffled[index * len(rows) // parts : (index + 1) * len(rows) // parts])
    return [row for row in rows if row in own]

"""In what order rows are trained on: epochs, each in an order of its own, which depends on the seed alone."""

from __future__ import annotations

import random


def shuffled_epochs(rows: int, wanted: int, seed: int | str) -> list[int]:
    """``wanted`` row numbers below ``rows``: one epoch after the other, the last one as far as it is wanted."""
    generator = random.Random(seed)
    order: list[int] = []
    while len(order) < wanted:
        epoch = list(range(rows))
        generator.shuffle(epoch)
        order += epoch
    return order[:wanted]


def row_order(rows: int, batch_size: int, steps: int, seed: int | str) -> list[list[int]]:
    """Row numbers of every step; a batch may reach from one epoch into the next."""
    order = shuffled_epochs(rows, steps * batch_size, seed)
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(steps)]

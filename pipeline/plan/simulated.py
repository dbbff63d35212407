"""Operations of what the anchor stage does with drawn rows: the warm-up, unrolled runs with their sweeps, and their scale.

The rows of every step are those that the run will draw where the whole data were read; of a sample, rows at the same places.
"""

from __future__ import annotations

from collections.abc import Sequence

from alphatoken.pipeline.anchor.places import TOKENS_PER_PASS
from alphatoken.pipeline.anchor.tape import kept_every, too_long
from alphatoken.pipeline.anchor.unrolled import rows_of_steps
from alphatoken.pipeline.maths.batch import IGNORED
from alphatoken.pipeline.maths.costs import (
    DIRECTIONS,
    ModelCosts,
    budget_shapes,
    shapes_of,
    step_flops,
    sweep_flops,
    value_flops,
)
from alphatoken.pipeline.maths.epochs import row_order
from alphatoken.pipeline.maths.unroll import SWEPT_TOKENS
from alphatoken.pipeline.plan.sample import Sample
from alphatoken.pipeline.prepare.draw import drawn_rows
from alphatoken.pipeline.prepare.tokenize import Example
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.settings import Settings


def warmup_flops(m: ModelCosts, sample: Sample, settings: Settings) -> int:
    """A ghost pass over the padded batch of each step, and the sum of its outer products."""
    own, seed = settings.anchor.warmup, settings.run.seed
    examples = drawn_examples(sample, own.examples, seed)
    total = 0
    for rows in row_order(len(examples), own.batch_size, own.steps, seed):
        lengths = [len(examples[row].input_ids) for row in rows]
        total += step_flops(m, shapes_of([(len(rows), max(lengths))], _response(examples, rows)))
    return total


def unrolled_flops(m: ModelCosts, sample: Sample, settings: Settings, objectives: int, losses: int) -> int:
    """All orders: the run, where the tape keeps not every state the steps made again, the sweep back, the run without the
    lowest tokens, and validation losses before, after and there (``losses`` operations each).

    Raises SettingsWrong for a tape beyond its bound.
    """
    own, seed = settings.anchor.unroll, settings.run.seed
    rank = own.adapter_rank
    weights = rank * m.adapter_width or m.scored_stored
    every = kept_every(own.steps, weights, own.tape_bytes)
    if every is None:
        raise SettingsWrong([too_long(own.steps, weights, own.tape_bytes)])
    examples = drawn_examples(sample, own.examples, seed)
    forward = sweep = 0
    for order in range(own.orders):
        for rows in rows_of_steps(len(examples), own, seed, order):
            lengths = [len(examples[row].input_ids) for row in rows]
            shapes = budget_shapes(lengths, _response(examples, rows), SWEPT_TOKENS)
            forward += step_flops(m, shapes, rank)
            sweep += sweep_flops(m, shapes, objectives, rank)
    return (2 if every == 1 else 3) * forward + sweep + own.orders * 3 * losses


def scale_flops(m: ModelCosts, sample: Sample, settings: Settings, snapshots: int) -> int:
    """Values of drawn examples at each snapshot, by whose root mean square its directions are divided."""
    examples = drawn_examples(sample, settings.anchor.warmup.examples, settings.run.seed)
    rows = range(len(examples))
    shapes = budget_shapes([len(e.input_ids) for e in examples], _response(examples, rows), TOKENS_PER_PASS)
    directions = DIRECTIONS + len(settings.objectives)
    return snapshots * value_flops(m, shapes, settings.valuation.window, directions=directions)


def drawn_examples(sample: Sample, wanted: int, seed: int) -> list[Example]:
    """What a simulated run draws; of pairs the chosen branch."""
    rows = sample.train[::2] if sample.pairs else sample.train
    return [rows[row * len(rows) // sample.train_rows] for row in drawn_rows(sample.train_rows, wanted, seed)]


def _response(examples: Sequence[Example], rows: Sequence[int]) -> int:
    return sum(label != IGNORED for row in rows for label in examples[row].labels)

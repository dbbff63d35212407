"""What a trial costs, and how many examples fit into ten minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from alphatoken.pipeline.maths.batch import IGNORED
from alphatoken.pipeline.maths.costs import (
    ModelCosts,
    Shapes,
    ghost_flops,
    loss_flops,
    lower_flops,
    outer_flops,
    shapes_of,
)
from alphatoken.pipeline.settings import Settings, TrialSettings

SECONDS = 600  # that trial.examples=auto aims at
FEWEST_STEPS, MOST_STEPS = 20, 200
CPU_RATE, DEVICE_RATE = 3e10, 3e13  # operations per second of a worker, where no stage of the run has shown them


@dataclass(frozen=True, slots=True)
class Extent:
    """``examples`` of the sample, ``steps`` of each fine-tune, and ``flops`` of all fine-tunes and measurements together."""

    examples: int
    steps: int
    flops: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens and response tokens of sequences, (tokens, response tokens) each; ``pairs``: whether an example is two."""

    train: Sequence[tuple[int, int]]
    held_out: Sequence[tuple[int, int]]
    completions: Sequence[tuple[int, int]]
    retention: Sequence[tuple[int, int]] = ()
    pairs: bool = False


def lengths_of(input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(tokens, response tokens) of every row."""
    return [(len(ids), sum(label != IGNORED for label in own)) for ids, own in zip(input_ids, labels, strict=True)]


def steps_of(settings: TrialSettings, examples: int) -> int:
    """trial.steps; auto: one epoch of the sample, within bounds."""
    if isinstance(settings.steps, int):
        return settings.steps
    return min(MOST_STEPS, max(FEWEST_STEPS, -(-examples // settings.batch_size)))


def extent(
    m: ModelCosts, settings: TrialSettings, rows: Lengths, available: int, kept: Sequence[float], rate: float
) -> Extent:
    """How far a trial goes. ``available``: training rows; ``kept``: the fraction that each fine-tune learns from, one entry per
    fine-tune; ``rate``: operations per second of all workers together.
    """
    if isinstance(settings.examples, int):
        examples = min(settings.examples, available)
        return Extent(
            examples, steps := steps_of(settings, examples), trial_flops(m, settings, rows, steps, examples, kept)
        )
    # Below this, fewer examples would cost as much: the steps stay.
    fewest = min(available, settings.batch_size * steps_of(settings, 0))
    examples = min(available, settings.batch_size * MOST_STEPS)
    while True:
        steps = steps_of(settings, examples)
        flops = trial_flops(m, settings, rows, steps, examples, kept)
        if flops <= SECONDS * rate or examples <= fewest:
            return Extent(examples, steps, flops)
        examples = max(fewest, examples * 3 // 4)


def trial_flops(
    m: ModelCosts, settings: TrialSettings, rows: Lengths, steps: int, examples: int, kept: Sequence[float]
) -> int:
    """Operations of all fine-tunes and what they measure; the lower layers once for each row, where they do not learn.

    Else every pass is a whole one, forward and, in a step, back through all layers.
    """
    whole, each = settings.train != "layers", (2 if rows.pairs else 1) / max(1, len(rows.train))
    if whole:  # no layer is below those that learn
        m = replace(m, lower=0, lower_layers=0, scored=m.lower + m.scored, scored_layers=m.layers)
    batch, sample = (_shapes(rows.train).times(count * each) for count in (settings.batch_size, examples))
    measured = [_shapes(some) for some in (rows.held_out, rows.completions, rows.retention)]
    total = sum(lower_flops(m, shapes) for shapes in [sample, *measured])
    if rows.pairs:  # log-probabilities under the reference
        total += sum(loss_flops(m, shapes) - lower_flops(m, shapes) for shapes in (sample, measured[0]))
    for fraction in kept:
        # A margin is over all response tokens, whatever is masked.
        predicting = batch.predicting if rows.pairs else round(fraction * batch.predicting)
        learned = replace(batch, predicting=predicting)
        step = ghost_flops(m, learned) - lower_flops(m, learned)
        step += 0 if settings.train == "lora" else outer_flops(m, learned.tokens)
        step += 2 * m.head * predicting * ((settings.train == "all") + (whole and rows.pairs))
        total += steps * step if fraction else 0  # of the untouched model it is measured alone
        total += sum(loss_flops(m, shapes) - lower_flops(m, shapes) for shapes in measured)
        total += 2 * m.head * measured[1].predicting  # the reference's predictions
    return total


def planned_extent(m: ModelCosts, settings: Settings, rows: Lengths, available: int) -> Extent:
    """Of a trial before there are masks: those of trial.masks, or with trial.auto the run's own and two presets, each of the
    size mask.rho, at every trial.rho."""
    own = settings.trial
    sizes = own.rho or [settings.mask.rho]
    masks = len(own.masks) or (3 if own.auto else 1)
    kept = [0.0, *own.seeds * [1.0, 1.0, *masks * sizes, *sizes]]
    return extent(m, own, rows, available, kept, CPU_RATE)


def _shapes(rows: Sequence[tuple[int, int]]) -> Shapes:
    return shapes_of([(1, tokens) for tokens, _ in rows], sum(response for _, response in rows))


def duration(seconds: float) -> str:
    """For people."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"

"""Masks of one run that are made together: each pass reads the rows once for all of them, and so does the writing.

Where more than one worker is asked for and the data is large, the passes and the writing go to the workers of the
cluster, some parts to each; a small mask is done before a cluster has started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from alphatoken.pipeline.cluster.work import cpus_here
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.mask.inputs import MaskInputs
from alphatoken.pipeline.mask.over_parts import Counting, MaskWorker, OverParts, Writing
from alphatoken.pipeline.mask.paired_rows import PairedParts
from alphatoken.pipeline.mask.passes import Asking, Found, Steps, look
from alphatoken.pipeline.mask.worker import Decider, Tally, Written
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings.cluster import INLINE

LARGE = 400  # times cluster.inline_below: tokens from which on workers are worth their start


@dataclass(frozen=True, slots=True)
class Planned:
    """One mask. ``hard``: whether values decide which labels stay; ``askings``: by branch."""

    run: Run
    inputs: MaskInputs
    fingerprint: str
    hard: bool
    askings: dict[str, Asking]

    def columns(self, branch: str) -> tuple[str, ...]:
        """What is read of a branch where its rows are decided."""
        return tuple(dict.fromkeys((*self.inputs.columns, *self.askings[branch].columns)))


def decide_together(planned: Sequence[Planned], rows_at_once: int) -> list[tuple[dict[str, Decider], dict[str, Tally]]]:
    """Write the parts of all masks; returns for each, by branch, how rows were decided and what was.

    ``planned``: all of one run. Goes on where it stopped. Raises RunFailed.
    """
    run = planned[0].run
    columns = _together(one.inputs.columns for one in planned)
    branches = list(planned[0].askings)
    sources = {b: PairedParts(run, rows_at_once, columns, run.settings.run.seed, b) for b in branches}
    with ExitStack() as stack:
        pool = None
        if _is_for_workers(run):
            arguments = {"storage": run.storage, "sources": sources}
            resources = run.cluster.tokenizer_resources()
            pool = stack.enter_context(run.cluster.pool(logged("mask", MaskWorker), arguments, resources))
        over = OverParts(run.storage, sources, run.progress, cpus_here(), pool)
        found = _found(planned, over)
        masks = [
            Written(
                one.inputs.settings.name, one.inputs.schema, one.fingerprint,
                {b: Decider(found[i][b], one.inputs.always, one.hard, one.columns(b)) for b in branches},
            )
            for i, one in enumerate(planned)
        ]  # fmt: skip
        reference = run.manifest.stage("value")["counts"]["reference_fingerprint"] if run.manifest.pairs else None
        writing = Writing(masks, {b: _together(one.columns(b) for one in planned) for b in branches}, reference)
        over.go(_title(planned, "write"), writing, 1)
    return [(mask.deciders, tally) for mask, tally in zip(masks, writing.tallies, strict=True)]


def _found(planned: Sequence[Planned], over: OverParts) -> list[dict[str, Found]]:
    """All passes of all masks: as many as the one with the most of them needs."""
    found: list[dict[str, Found]] = [{} for _ in planned]
    going: list[tuple[int, str, Steps]] = [
        (index, branch, look(asking)) for index, one in enumerate(planned) for branch, asking in one.askings.items()
    ]
    passes: Counter[str] = Counter()
    while going:
        looks, still = [], []
        for index, branch, steps in going:
            try:
                looks += next(steps)
                still.append((index, branch, steps))
            except StopIteration as end:
                found[index][branch] = end.value
        going = still
        if looks:
            title = ", ".join(dict.fromkeys(one.title for one in looks))
            passes[title] += 1
            again = f", pass {passes[title]}" if passes[title] > 1 else ""
            over.go(_title(planned, f"{title}{again}"), Counting(looks), len({one.branch for one in looks}))
    return found


def _title(planned: Sequence[Planned], what: str) -> str:
    return f"{'mask' if len(planned) == 1 else f'{len(planned)} masks'}: {what}"


def _together(columns: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for some in columns for name in some))


def _is_for_workers(run: Run) -> bool:
    """Whether more than one worker is asked for, or a cluster, and the data is worth it."""
    own = run.settings.cluster
    asked = own.workers not in ("auto", 1) or own.address is not None
    if own.address == INLINE or not asked:
        return False
    tokens = run.manifest.stage("prepare")["counts"].get("tokens")
    return tokens is not None and tokens >= LARGE * own.inline_below

"""The unrolled runs of a stage: which rows they take, one shard per order, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alphatoken.pipeline.anchor.own_step import PLACE
from alphatoken.pipeline.anchor.places import PARTIAL, POLICY
from alphatoken.pipeline.anchor.tensors import counts_of
from alphatoken.pipeline.anchor.unrolled import Held, units_of
from alphatoken.pipeline.anchor.worker import NO_ROWS, AnchorTask
from alphatoken.pipeline.cluster.work import Pool, Shard
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings.objectives import RETENTION, TASK
from alphatoken.pipeline.settings.unroll import ENOUGH_VALIDATION, LEAST_VALIDATION


def check_validation(rows: int, objective: str = "adaptation") -> str | None:
    """What to say of the ``rows`` validation rows of an objective, None where they are enough. Raises SettingsWrong for too
    few."""
    of = "" if objective == "adaptation" else f" of {objective.removeprefix(TASK)}"
    if rows < LEAST_VALIDATION:
        key = "data.retention" if objective == RETENTION else "data.validation"
        raise SettingsWrong(
            [
                f"anchor.direction=unrolled with {rows} validation rows{of} fits them and not the task: give {key} at "
                f"least {LEAST_VALIDATION} (with data.validation_trial=half twice that), better {ENOUGH_VALIDATION}, or set "
                "anchor.direction=gradient"
            ]
        )
    if rows < ENOUGH_VALIDATION:
        return (
            f"warning: {rows} validation rows{of} are few for anchor.direction=unrolled, which fits the rows that it is given: "
            f"better {ENOUGH_VALIDATION}"
        )
    return None


def check_examples(rows: int, batch_size: int) -> None:
    """Raises SettingsWrong where the training rows do not make one batch."""
    if rows < batch_size:
        raise SettingsWrong(
            [f"anchor.unroll.batch_size={batch_size}, but there are {rows} training examples: give a smaller one"]
        )


def unroll_orders(
    run: Run, pool: Pool, fingerprint: str, drift: str, examples: Sequences, rows: Mapping[str, Sequences]
) -> dict[str, dict[str, Any]]:
    """Make every order that is not complete yet, each by one worker, whom those help that have none; returns the counts of
    each by name.

    ``rows``: objective -> its validation rows.
    """
    unroll, progress = run.settings.anchor.unroll, run.progress
    for objective, own in rows.items():
        if said := check_validation(len(own), objective):
            progress.say(f"anchor: {said}")
    check_examples(len(examples), unroll.batch_size)
    held = {objective: Held.of(own) for objective, own in rows.items()}
    tasks = {
        f"order-{order:02d}": AnchorTask(
            "unroll",
            f"{PARTIAL}/unroll-{order:02d}.safetensors",
            examples,
            fingerprint=fingerprint,
            index=order,
            drift=drift,
            held=held,
        )
        for order in range(unroll.orders)
    }
    found: dict[str, dict[str, Any]] = {}
    for index, (name, task) in enumerate(tasks.items()):
        own_step, at_points = run.settings.valuation.own_step, run.settings.valuation.looks_at_anchors
        files = [POLICY.format(index=index * unroll.snapshots + i) for i in range(unroll.snapshots * at_points)]
        files += [PLACE.format(order=index)] * own_step
        counts = counts_of(run.storage, task.output, fingerprint)
        if counts is not None and all(counts_of(run.storage, one, fingerprint) is not None for one in files):
            found[name] = counts
    missing = [Shard(name, units_of(unroll, held)) for name in tasks if name not in found]
    if len(missing) < len(tasks):
        progress.say(f"anchor: {len(tasks) - len(missing)} of {len(tasks)} unrolled runs are complete already")
    # A pass has at least a row.
    helpers = max(0, min(pool.workers - len(missing), len(missing) * (unroll.batch_size - 1)))
    board = pool.board([tasks[shard.name].output for shard in missing]) if helpers else None
    work = {shard.name: replace(tasks[shard.name], board=board, store=pool.store) for shard in missing}
    helping = [Shard(f"helper-{number:02d}", 0) for number in range(helpers)]
    work |= {shard.name: AnchorTask("help", shard.name, NO_ROWS, board=board, store=pool.store) for shard in helping}

    def done(shard: Shard, result: dict[str, Any]) -> None:
        if shard not in helping:
            found[shard.name] = result

    with progress.task("anchor: unrolled runs", sum(shard.units for shard in missing), "steps") as shown:
        pool.run([*missing, *helping], lambda s: work[s.name], done, shown)
    tasks_alone = [one for objective, one in held.items() if objective != RETENTION]
    made, left_out = (sum(len(getattr(one, rows)) for one in tasks_alone) for rows in ("made", "left_out"))
    for name in tasks:
        progress.say(f"anchor: {name.replace('-', ' ')}: {_told(found[name], made, left_out)}")
    return {name: found[name] for name in tasks}


def _told(counts: dict[str, Any], made: int, left_out: int) -> str:
    """How far the validation loss falls when the run leaves out the tokens of the lowest values, on both sets of rows."""
    own, other = (counts[f"{rows}_after"] - counts[f"{rows}_masked"] for rows in ("made", "left_out"))
    share = "none on the rows that made it" if not own > 0 else f"{other / own:.0%} of it"
    if made + left_out < ENOUGH_VALIDATION:
        share += f"; {left_out} rows are too few to go by, `alphatoken trial` has others"
    tape = "" if counts["tape_every"] == 1 else f"; every {counts['tape_every']}th state was kept"
    helped = f"; other workers made {counts['helped']} of its passes" if counts.get("helped") else ""
    return (
        f"validation loss {counts['made_before']:.4f} to {counts['made_after']:.4f} nats; without the lowest tenth of the "
        f"tokens it ends {own:+.4f} lower on the {made} rows that made the direction, {other:+.4f} on {left_out} others "
        f"({share}){tape}{helped}"
    )

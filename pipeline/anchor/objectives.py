"""Whose validation rows make which direction: all of them adaptation, each task's one of its own, and data.retention.

    G = sum over tasks of N_task / N * G_task,   N_task the response tokens of a task's rows

so that the rows of tasks are gone over once, and those of all tasks together not at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from alphatoken.pipeline.prepare.reader import retention_rows, validation_rows
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.remedies import anew
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings.objectives import RETENTION, objective_of


def rows_of_objectives(run: Run) -> dict[str, Sequences]:
    """Direction -> its validation rows: adaptation alone, or one for each task; and retention where there is data.retention.

    A rehearsal has adaptation alone. Raises RunFailed for rows that are missing.
    """
    if run.settings.valuation.rehearsed or not run.settings.data.tasks:
        everything = validation_rows(run)
        parts = list(everything.values())
        found = {
            "adaptation": Sequences(*(sum((getattr(p, n) for p in parts), []) for n in ("ids", "input_ids", "labels")))
        }
    else:
        found = {objective_of(task): rows for task, rows in validation_rows(run).items()}
    if RETENTION in run.settings.objectives:
        rows = retention_rows(run)
        if rows is None:
            raise RunFailed(
                "prepared/ has no rows of data.retention: make them, "
                f"{anew(run.storage.place, 'prepare', {'data.retention': run.settings.data.retention})}"
            )
        found[RETENTION] = rows
    return found


def response_tokens(rows: Sequences) -> int:
    """How many tokens of ``rows`` have a loss."""
    return sum(label != IGNORED for labels in rows.labels for label in labels)


def shares_of_adaptation(tokens: Mapping[str, int]) -> dict[str, float]:
    """What each objective's direction is weighed with in that of all tasks together; ``tokens``: of its rows.

    Raises RunFailed where all of them have none.
    """
    own = {name: count for name, count in tokens.items() if name != RETENTION}
    total = sum(own.values())
    if not total or not all(tokens.values()):
        raise RunFailed("the validation set has no response token: give other rows with data.validation")
    return {name: count / total for name, count in own.items()}


def with_adaptation(
    named: Mapping[str, Mapping[str, torch.Tensor]], shares: Mapping[str, float]
) -> dict[str, Mapping[str, torch.Tensor]]:
    """The same directions, and adaptation as the weighed sum of the tasks' where it is not among them."""
    if "adaptation" in named:
        return dict(named)
    first, *others = shares
    total = {name: shares[first] * tensor for name, tensor in named[first].items()}
    for task in others:
        for name, tensor in named[task].items():
            total[name].add_(tensor, alpha=shares[task])
    return {"adaptation": total, **named}

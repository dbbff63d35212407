"""Objectives beside those of all validation rows together: one for each task of data.validation, and data.retention."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from alphatoken.data_schemas.values import PATHS, UNROLLED

RETENTION = "retention"
RESERVED = (  # words of mask.weights and mask.require, and endings of columns
    "adaptation", "all", "causal", "direct", "exact", "none", RETENTION, "stability", "unrolled",
)  # fmt: skip
TASK = "adaptation_"  # the beginning of a task's direction and columns
NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")


def objective_of(name: str) -> str:
    """The direction, and the beginning of the columns, of a name in mask.weights: a task, adaptation or retention."""
    return name if name in ("adaptation", RETENTION) else f"{TASK}{name}"


def names_in(columns: Collection[str], score: str = "paper") -> list[str]:
    """The tasks, and retention, that have columns for mask.score in values/; as mask.weights names them, in their order."""
    ending = UNROLLED if score == "unrolled" else PATHS[0]
    found = [column.removesuffix(ending) for column in columns if column.endswith(ending)]
    return [one.removeprefix(TASK) for one in found if one == RETENTION or one.startswith(TASK)]


def columns_of(name: str, score: str = "paper") -> tuple[str, ...]:
    """The columns of values/ that a name in mask.weights means with mask.score."""
    endings = (UNROLLED,) if score == "unrolled" else PATHS
    return tuple(f"{objective_of(name)}{ending}" for ending in endings)


def task_problems(validation: Mapping[Any, Any]) -> list[str]:
    """Why the tasks of data.validation cannot be used, one sentence each."""
    found = [] if validation else ["data.validation={}: give a task with its rows, or a file"]
    for name, rows in validation.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or name.endswith("_"):
            found.append(
                f"data.validation: a task named {name}: small letters, digits and _, a letter first, at most 31 of them, since "
                "it names columns"
            )
        elif name in RESERVED:
            found.append(f"data.validation: a task named {name}: the word has another meaning, choose another name")
        if isinstance(rows, bool | int | float | Mapping) or not rows:
            found.append(f"data.validation.{name}={rows}: must be a file, a glob, a directory or a hub id")
    return found


def unknown_names(key: str, names: Collection[str], there: Collection[str], score: str) -> list[str]:
    """What to say of ``names`` that have no columns for mask.score among ``there``, one sentence each."""
    known = names_in(there, score)
    found = []
    for name in names:
        if name in known or (name == "adaptation" and set(columns_of(name, score)) <= set(there)):
            continue
        near = get_close_matches(name, known, n=1)
        have = f"values/ has columns of {', '.join(known)}" if known else "values/ has no columns of tasks"
        remedy = "data.retention=FILE" if name == RETENTION else f"data.validation={{{name}: FILE, ...}}"
        also = "valuation.schedule=own_step" if score == "unrolled" else "with paper in valuation.scores"
        hint = f"did you mean {near[0]}?" if near else f"make them with {remedy} and {also}"
        found.append(f"{key}: there is no task {name}: {have}; {hint}")
    return found

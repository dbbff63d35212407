"""Responses that begin with their prompt: exports that hold whole texts beside the prompt, which would stand twice.

A single response may repeat its prompt because it has a reason to. Where every row of a data set does, it is how the
rows were written, and the prompt is taken off.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from alphatoken.data_schemas import BRANCHES
from alphatoken.pipeline.prepare.columns import columns_of, value_of
from alphatoken.pipeline.prepare.decoding import decode
from alphatoken.pipeline.prepare.rows import shape_of

if TYPE_CHECKING:
    from alphatoken.pipeline.prepare.sources import Sources  # with `datasets`, which a worker does without

BATCH = 256  # rows in memory at a time


def repeats_prompt(row: Any, columns: Mapping[str, str]) -> bool | None:
    """Whether the response (of pairs both branches) begins with the prompt; None for a row without either, or unreadable."""
    names = _response_names(row, columns) if isinstance(row, Mapping) else None
    if names is None:
        return None
    prompt, *responses = (value_of(row, name, columns) for name in ("prompt", *names))
    if not responses or not all(isinstance(text, str) for text in (prompt, *responses)):
        return False  # messages: a shape in which a prompt that stands in both is known
    return all(response.startswith(prompt) for response in responses) if prompt.strip() else None


def without_prompt(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row that repeats its prompt, with responses that go on from it."""
    cut = len(value_of(row, "prompt", columns))
    names = _response_names(row, columns) or ()
    own = [next(c for c in columns_of(name, columns) if row.get(c) is not None) for name in names]
    return {**row, **{column: row[column][cut:] for column in own}}


def all_repeat_prompt(data: Sources, columns: Mapping[str, str]) -> bool:
    """Whether every row that has a prompt repeats it. Stops at the first that does not, or where none has one for long."""
    found = False
    for file in data.files:
        for start in range(0, len(file.rows), BATCH):
            for row, reason in decode(file.table(range(start, min(start + BATCH, len(file.rows))))):
                said = repeats_prompt(row, columns) if reason is None else None
                if said is False:
                    return False
                found = found or said is True
            if not found and start + BATCH < len(file.rows):
                return False
    return found


def repeating(data: Sources, tasks: Mapping[str, Collection[str]], columns: Mapping[str, str]) -> bool | frozenset[str]:
    """``all_repeat_prompt``; where there are ``tasks`` (task -> names of its files), the files of those that do."""
    if not tasks:
        return all_repeat_prompt(data, columns)
    own = {task: replace(data, files=tuple(f for f in data.files if f.name in files)) for task, files in tasks.items()}
    return frozenset(name for task, files in tasks.items() if all_repeat_prompt(own[task], columns) for name in files)


def _response_names(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, ...] | None:
    """The responses of a row with plain prompts; none of another shape, None of a row that has no shape."""
    kind = shape_of(row, columns)
    return None if kind == "unknown" else {"preference": BRANCHES, "prompt_completion": ("completion",)}.get(kind, ())

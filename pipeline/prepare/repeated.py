"""Responses that begin with their prompt: exports that hold whole texts beside the prompt, which would stand twice.

A single response may repeat its prompt because it has a reason to. Where every row of a data set does, it is how the
rows were written, and the prompt is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alphatoken.data_schemas import BRANCHES
from alphatoken.pipeline.prepare.columns import columns_of, value_of
from alphatoken.pipeline.prepare.rows import shape_of
from alphatoken.pipeline.prepare.sources import Sources, decode

BATCH = 1000  # rows in memory at a time


def repeats_prompt(row: Any, columns: Mapping[str, str]) -> bool | None:
    """Whether the response (of pairs both branches) begins with the prompt; None for a row of which this cannot be asked."""
    prompt, responses = _texts(row, columns)
    return all(response.startswith(prompt) for response in responses) if prompt.strip() and responses else None


def without_prompt(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row that repeats its prompt, with responses that go on from it."""
    prompt, responses = _texts(row, columns)
    names = [next(c for c in columns_of(n, columns) if row.get(c) is not None) for n in _response_names(row, columns)]
    return {**row, **{name: text[len(prompt) :] for name, text in zip(names, responses, strict=True)}}


def all_repeat_prompt(data: Sources, columns: Mapping[str, str]) -> bool:
    """Whether every row that has a prompt and a response repeats it. Stops reading at the first that does not."""
    found = False
    for file in data.files:
        for start in range(0, len(file.rows), BATCH):
            table = file.table(range(start, min(start + BATCH, len(file.rows))))
            for row, reason in decode(table):
                said = repeats_prompt(row, columns) if reason is None else None
                if said is False:
                    return False
                found = found or said is True
    return found


def _texts(row: Any, columns: Mapping[str, str]) -> tuple[str, list[str]]:
    """Prompt and responses of a row of plain strings; no responses for another."""
    if not isinstance(row, Mapping):
        return "", []
    texts = [value_of(row, name, columns) for name in ("prompt", *_response_names(row, columns))]
    strings = [text for text in texts if isinstance(text, str)]
    return (strings[0], strings[1:]) if len(strings) == len(texts) else ("", [])


def _response_names(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, ...]:
    return {"preference": BRANCHES, "prompt_completion": ("completion",)}.get(shape_of(row, columns), ())

"""Commands that make something of a run again, as they can be typed; ``place``: of the run, as Storage has it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from alphatoken.pipeline.settings.spelling import overrides, quoted


def again(place: str, stage: str) -> str:
    """Of what is missing or damaged, which the stage itself does not take for finished."""
    return f"`alphatoken {stage} {_own(place, 'run.json')}` makes it again"


def anew(place: str, stage: str, more: Mapping[str, object] | None = None) -> str:
    """Of what was made otherwise: a stage and all that follow; ``more``: key -> value, to be set on the way."""
    added = "".join(f"{shlex.quote(override)} " for override in overrides(more or {}))
    return f"`alphatoken run {_own(place, 'run.json')} {added}run.overwrite={stage}`"


def first(place: str, stage: str) -> str:
    """Of what a run has not got yet."""
    return f"run `alphatoken {stage} {_own(place, 'run.json')}` first"


def mask_again(place: str, name: str) -> str:
    """Of a mask whose shards are missing; it keeps its settings."""
    return f"`alphatoken mask {_own(place, f'masks/{name}/summary.json')}` makes it again"


def mask_anew(place: str, name: str) -> str:
    """Of a mask whose shards are there and wrong."""
    return f"remove {place}/masks/{name}/data, and {mask_again(place, name)}"


def _own(place: str, settings: str) -> str:
    return f"--from {shlex.quote(f'{place}/{settings}')} {shlex.quote(f'run.dir={quoted(place)}')}"

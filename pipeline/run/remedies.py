"""Commands that make something of a run again, as they can be typed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from alphatoken.pipeline.settings.spelling import overrides, quoted


def again(root: str, stage: str) -> str:
    """Of what is missing or damaged, which the stage itself does not take for finished."""
    return f"`alphatoken {stage} {_own(root, 'run.json')}` makes it again"


def anew(root: str, stage: str, more: Mapping[str, object] | None = None) -> str:
    """Of what was made otherwise: a stage and all that follow; ``more``: key -> value, to be set on the way."""
    added = "".join(f"{shlex.quote(override)} " for override in overrides(more or {}))
    return f"`alphatoken run {_own(root, 'run.json')} {added}run.overwrite={stage}`"


def mask_again(root: str, name: str) -> str:
    """Of a mask whose shards are missing; it keeps its settings."""
    return f"`alphatoken mask {_own(root, f'masks/{name}/summary.json')}` makes it again"


def mask_anew(root: str, name: str) -> str:
    """Of a mask whose shards are there and wrong."""
    return f"remove {root}/masks/{name}/data, and {mask_again(root, name)}"


def _own(root: str, settings: str) -> str:
    return f"--from {shlex.quote(f'{root}/{settings}')} {shlex.quote(f'run.dir={quoted(root)}')}"

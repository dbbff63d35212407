"""Overrides as somebody types them, made into what Hydra's grammar reads; what can be no override at all is said.

A path may have brackets, blanks or `=` in it, a shell leaves `~/` alone in the middle of a word, and a list of one is typed
as the one.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from alphatoken.jobs.keys import keys, texts
from alphatoken.jobs.suggestion import near
from alphatoken.pipeline.settings.spelling import in_quotes, quoted

# Begins a list, a mapping, a quoted text or an interpolation: it is Hydra's as it stands.
NOTATION = ("[", "{", "'", '"', "$")
GRAMMAR = (  # what Hydra's parser says of what it cannot read
    "no viable alternative", "mismatched input", "extraneous input", "NoViableAlt", "token recognition", "missing '",
    "Error parsing override",
)  # fmt: skip


def as_read(overrides: Sequence[str]) -> list[str]:
    """``overrides`` with values that Hydra reads as they were meant; those of keys that do not exist stay."""
    known, text = keys(), texts()
    return [_as_read(override, known, text) for override in overrides]


def _as_read(override: str, known: Mapping[str, tuple[Any, str]], text: Collection[str]) -> str:
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    if not equals or not value or name not in known or value.startswith(NOTATION):
        return override
    if value.startswith("~/"):
        value = os.path.expanduser(value)
    parsed = _parsed(f"{key}={value}")
    if parsed is None and "," in value:  # which of its parts is meant cannot be known
        return override
    if parsed is None:
        value = quoted(value)
    one = parsed is None or (not parsed.is_sweep_override() and isinstance(parsed.value(), str | int | float))
    if parsed is not None and name in text:
        value = _as_text(parsed, value)
    return f"{key}=[{value}]" if one and isinstance(known[name][0], list) else f"{key}={value}"


def _as_text(parsed: Override, value: str) -> str:
    """``value`` of a key of texts, with quotes where Hydra would read something else: 1.10 is a revision, and no number."""
    if not parsed.is_sweep_override():
        return in_quotes(value) if isinstance(parsed.value(), int | float) else value
    sweep = parsed.value()
    if not isinstance(sweep, ChoiceSweep) or not sweep.simple_form or any(mark in value for mark in NOTATION):
        return value
    return ",".join(in_quotes(one) if isinstance(read, int | float) else one
                    for one, read in zip(value.split(","), sweep.list, strict=True))  # fmt: skip


def _parsed(override: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def legible(reason: str) -> str:
    """What Hydra's parser says, in words of the command line."""
    if any(said in reason for said in GRAMMAR):
        return (
            f"it cannot be read: is a bracket or a quote left open, or does a path need quotes of its own? ({reason})"
        )
    return reason


def stray_words(overrides: Sequence[str]) -> dict[int, str]:
    """Place -> what is wrong with it, of the words of a command line that set nothing; mostly a blank made them."""
    known = keys()
    found: dict[int, str] = {}
    for place, word in enumerate(overrides):
        before = overrides[place - 1] if place else ""
        after = overrides[place + 1] if place + 1 < len(overrides) else ""
        if place in found or word.startswith("~"):
            continue
        if word == "=" or (word.startswith("=") and before in known):
            found[place - 1] = f"{before} {word} {after}".strip() + ": no blanks around the =: " + f"{before}=..."
            found[place] = found[place - 1]
            if word == "=":
                found[place + 1] = found[place - 1]
        elif "=" in word:
            continue
        elif before.endswith(",") or before.count("[") > before.count("]") or before.count("{") > before.count("}"):
            found[place] = f"{before} {word}: no blanks inside, or the whole in quotes: '{before} {word}'"
            found[place - 1] = found[place]
        elif before in known:
            found[place] = f"{before} {word}: no blank between a key and its value: {before}={word}"
            found[place - 1] = found[place]
        elif word in known:
            found[place] = f"{word}: give a value: {word}=..."
        else:
            found[place] = f"{word}: not a setting: give key=value{_meant(word, before, known)}"
    return found


def _meant(word: str, before: str, known: Collection[str]) -> str:
    if "=" in before and "." in word:
        return f", such as data.train={word}, or in quotes what has a blank: '{before} {word}'"
    return f", such as data.train={word}" if "/" in word or "." in word else near(word, known)

"""Settings that are empty texts, which is what an unset variable of a shell leaves behind."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any


def empty_texts(settings: Any, prefix: str = "") -> list[str]:
    """One sentence for every text, or text in a list, that holds nothing but blanks, over a tree of dataclasses."""
    found = []
    for each in fields(settings):
        key, value = f"{prefix}{each.name}", getattr(settings, each.name)
        if is_dataclass(value):
            found += empty_texts(value, f"{key}.")
            continue
        texts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(text, str) and not text.strip() for text in texts):
            found.append(f"{key}{_SAID if texts is not value else _SAID_OF_LISTS}")
    return found


_WHY = "(an unset variable of the shell?): give a value, or leave the key out"
_SAID = f" is empty {_WHY}"
_SAID_OF_LISTS = f" has an empty entry {_WHY}"

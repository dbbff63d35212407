"""Settings as overrides that can be typed, in Hydra's grammar; the shell's quotes are left to who writes a command."""

from __future__ import annotations

import re
from collections.abc import Mapping

# What Hydra reads as something else than text.
_NO_TEXT = re.compile(r"[+-]?(\d[\d_]*(\.\d*)?|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)|true|false|null", re.IGNORECASE)


def overrides(settings: Mapping[str, object]) -> list[str]:
    """``key=value`` of each."""
    return [f"{key}={spelled(value)}" for key, value in settings.items()]


def spelled(value: object) -> str:
    """A value of any kind as an override has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(spelled, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {spelled(one)}' for key, one in value.items())}}}"
    return quoted(value)


def quoted(value: object) -> str:
    """A value for Hydra's grammar, in which a backslash means itself but before a quotation mark; text stays text."""
    text = str(value)
    plain = text.isascii() and all(c.isalnum() or c in "/._-" for c in text)
    if plain and not (isinstance(value, str) and _NO_TEXT.fullmatch(text)):
        return text
    return in_quotes(text)


def in_quotes(text: str) -> str:
    """The same, in quotes in any case."""
    text = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return f"'{text}'"

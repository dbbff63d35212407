"""One configuration key: a dataclass field whose metadata is the help text that the command line shows."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A field with a default and a help text; list defaults are copied for every instance."""
    metadata = {"help": help}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def one_of(key: str, value: object, allowed: tuple[str, ...]) -> list[str]:
    """The problem with ``key`` when ``value`` is not among ``allowed``, as a list of no or one sentence."""
    return [] if value in allowed else [f"{key}={value}: must be one of {', '.join(allowed)}"]


def at_least(key: str, value: float, bound: float) -> list[str]:
    """The problem with ``key`` when ``value`` is below ``bound``, as a list of no or one sentence."""
    return [] if value >= bound else [f"{key}={value}: must be at least {bound}"]


def auto_or_at_least(key: str, value: float | str, bound: int) -> list[str]:
    """As ``at_least`` for keys that also take the word ``auto``."""
    if isinstance(value, str):
        return [] if value == "auto" else [f"{key}={value}: must be auto or a whole number"]
    return at_least(key, value, bound)

"""Every key of the configuration, from the settings' own dataclasses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any

from alphatoken.pipeline.settings import Settings


def _all(kind: Any, prefix: str = "") -> Iterator[tuple[str, Field, Any]]:
    """(key, field, default) of each."""
    instance = kind()
    for field in fields(kind):
        value, name = getattr(instance, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from _all(type(value), f"{name}.")
        else:
            yield name, field, value


def keys(kind: Any = Settings) -> dict[str, tuple[Any, str]]:
    """Every configuration key -> (default, help text)."""
    return {name: (value, field.metadata.get("help", "")) for name, field, value in _all(kind)}


def texts() -> set[str]:
    """The keys whose values are text or a list of text, also where it looks like a number."""
    kinds = (str, str | None, list[str])
    return {name for name, field, _ in _all(Settings) if field.type in kinds}

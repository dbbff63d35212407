"""Rows of Arrow columns in the values that they had before they became columns.

Arrow gives every struct of a column the union of all keys, null where a row did not have one; those are left out again.
So a null that a row did have cannot be told from a key that it had not. Where that matters (arguments and schemas of
tools), columns of JSON text keep it: as strings, which are decoded where they are read, or in Arrow's JSON type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

_TOOLS = ("tools", "arguments")


def typed_rows(table: pa.Table) -> Iterator[tuple[Any, str | None]]:
    """Rows as (row, None), or (the row as text, reason) for one with a value that has no counterpart in Python."""
    clean = {field.name: change for field in table.schema if (change := _change(field.type)) is not None}
    try:
        rows = table.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        for index in range(table.num_rows):
            one = table.slice(index, 1)
            try:
                row = one.to_pylist()[0]
            except (ValueError, OverflowError, pa.ArrowException) as error:
                yield str(one.to_string(preview_cols=100)), f"unreadable: {type(error).__name__}: {error}"
            else:
                yield _cleaned(row, clean)
        return
    for row in rows:
        yield _cleaned(row, clean)


def structs_of_tools(schema: pa.Schema) -> list[str]:
    """Paths of the struct columns that hold arguments or schemas of tools, in which a null is lost."""
    found: list[str] = []

    def look(name: str, path: str, kind: pa.DataType) -> None:
        while _is_list(kind):
            kind = kind.value_type
        if not pa.types.is_struct(kind):
            return
        if name in _TOOLS:
            found.append(path)
            return
        for field in kind:
            look(field.name, f"{path}.{field.name}", field.type)

    for field in schema:
        look(field.name, field.name, field.type)
    return found


def _cleaned(row: dict[str, Any], clean: dict[str, Callable[[Any], Any]]) -> tuple[Any, str | None]:
    try:
        for name, change in clean.items():
            row[name] = change(row[name])
    except (ValueError, RecursionError) as error:
        return row, f"broken_json: {error}"
    return row, None


def _change(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What is done with values of a type; None where it is nothing (so that lists of numbers are not walked through)."""
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json":
        return _decoded
    if _is_list(kind):
        inner = _change(kind.value_type)
        return None if inner is None else lambda items: None if items is None else [inner(item) for item in items]
    if not pa.types.is_struct(kind):
        return None
    parts = {field.name: _change(field.type) for field in kind}

    def without_nulls(value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        present = ((key, item, parts[key]) for key, item in value.items() if item is not None)
        return {key: item if part is None else part(item) for key, item, part in present}

    return without_nulls


def _decoded(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)

"""Raw rows as the workers get them: a table's typed columns, or a column of text that holds a row each.

Apart from `sources`, which needs `datasets`: a worker that decodes and tokenizes does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from alphatoken.pipeline.prepare.typed import typed_rows

TEXT = "__row_as_text__"  # the column of text formats
TOO_MANY_FIELDS = "__too_many_fields__"
TOO_LONG = "__too_long__"
LONGEST_LINE = 64 << 20  # bytes; what has no line break for longer is no row, and must not fill the memory


def decode(table: pa.Table) -> Iterator[tuple[Any, str | None]]:
    """Rows of a raw table as (row, None), or (raw text, reason) for a row that cannot be read."""
    if table.column_names != [TEXT] or not pa.types.is_large_string(table.schema.field(0).type):
        yield from typed_rows(table)
        return
    for text in table.column(TEXT).to_pylist():
        try:
            content = (text or "").encode("latin-1")
            row = json.loads(content)
        except UnicodeEncodeError as error:  # a Parquet file with a column of this very name
            yield text, f"bad_unicode: {error}"
            continue
        except (ValueError, RecursionError) as error:
            yield content.decode("utf-8", "backslashreplace"), f"broken_json: {error}"
            continue
        if not isinstance(row, dict):
            yield row, f"wrong_type: a row must be an object, not {type(row).__name__}"
        elif TOO_LONG in row:
            yield row, f"too_long: a line of {row[TOO_LONG]} bytes, more than {LONGEST_LINE}"
        elif TOO_MANY_FIELDS in row:
            yield row, "broken_csv: more fields than the header has columns"
        else:
            yield row, None

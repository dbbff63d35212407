"""Columns that data.columns names: looked for in the data before any of it is read as something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alphatoken.pipeline.prepare.columns import shown
from alphatoken.pipeline.prepare.decoding import decode
from alphatoken.pipeline.prepare.sources import Source, Sources
from alphatoken.pipeline.run.failure import SettingsWrong

AT_ONCE, MOST_ROWS = 16, 4096  # of each file


def named_columns(columns: Mapping[str, str], data: Sequence[Sources]) -> tuple[str, ...]:
    """What is to be said of columns that the first rows of no file have, a line each.

    ``columns``: canonical name -> the user's. Raises SettingsWrong where these rows are all that there are.
    """
    missing, present, whole = set(columns.values()), set[str](), True
    for file in (file for sources in data for file in sources.files):
        if not missing:
            break
        present |= _present(file, missing)
        missing -= present
        whole = whole and len(file.rows) <= MOST_ROWS
    lines = [f"data.columns.{name}={own}" for name, own in columns.items() if own in missing]
    if lines and whole:
        raise SettingsWrong(
            [
                f"{line}: no row has such a column; there are {shown(sorted(present))}: name one of them, or leave the key out"
                for line in lines
            ]
        )
    return tuple(f"{line}: none of the first {MOST_ROWS:,} rows of a file has such a column" for line in lines)


def _present(file: Source, wanted: set[str]) -> set[str]:
    """Names of columns that the first rows have, up to the row with which all of ``wanted`` are found."""
    found: set[str] = set()
    for start in range(0, min(MOST_ROWS, len(file.rows)), AT_ONCE):
        table = file.table(range(start, min(start + AT_ONCE, len(file.rows))))
        found.update(*(map(str, row) for row, reason in decode(table) if reason is None))
        if wanted <= found:
            break
    return found

"""`python -m benchmarks.models`: which model types are valued right, which are refused and why."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from benchmarks.models.apart import surveyed
from benchmarks.models.compare import NOT_SMALL, PARTLY, RAW, REFUSED, RIGHT, WRONG, Row
from benchmarks.models.small import model_types
from benchmarks.models.table import counted, page


def main() -> int:
    """Survey, print the counts, write the page where asked for; 1 where the engine was at fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these model types alone")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table here, such as docs/models.md")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--faults", type=Path, metavar="FILE", help="write what is not right, with tracebacks, here, row by row"
    )
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    kinds = [kind for kind in model_types() if not asked.only or kind.name in asked.only]
    if unknown := set(asked.only or ()) - {kind.name for kind in kinds}:
        parser.error(f"--only {sorted(unknown)[0]}: no causal or image-text model type of this transformers")
    rows = []
    for row in surveyed(kinds, asked.jobs):
        rows.append(row)
        said = "; ".join(part for part in (row.reason, *row.notes) if part)
        print(f"{len(rows)}/{len(kinds)} {row.title}: {row.outcome}{f': {said}' if said else ''}", flush=True)
        if asked.faults:
            asked.faults.write_text(_faults(rows))
    print(counted(rows))
    if asked.write:
        asked.write.write_text(page(rows))
    return int(any(row.outcome in (WRONG, RAW) for row in rows))


def _faults(rows: list[Row]) -> str:
    parts = [counted(rows)]
    for outcome in (WRONG, RAW, REFUSED, PARTLY, NOT_SMALL):
        some = [row for row in rows if row.outcome == outcome]
        parts.append(f"\n## {outcome} ({len(some)})\n")
        for row in some:
            notes = f" [{'; '.join(row.notes)}]" if row.notes else ""
            parts.append(f"- {row.title} ({row.owner}): {row.reason}{notes}")
            parts += [f"      {line}" for line in row.trace.splitlines()[-7:-1]]
    names = ", ".join(row.title for row in rows if row.outcome == RIGHT)
    return "\n".join([*parts, f"\n## {RIGHT}\n", names, ""])


if __name__ == "__main__":
    sys.exit(main())

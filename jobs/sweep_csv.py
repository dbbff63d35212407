"""`mask -m --csv FILE`: the table of a sweep for pandas and spreadsheets, with the settings of every mask."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alphatoken.data_schemas import COMPONENTS
from alphatoken.jobs.sweep import ComparedMasks, PointFailure
from alphatoken.pipeline.mask.comparison import ComparedMask
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.redaction import redacted

COUNTS = ("rows", "response_tokens", "kept_tokens", "rows_with_nothing_kept")
FIRST = (
    "run", "mask", "branch", "baseline", *COUNTS, "kept_fraction", "agreement", "loss_of_kept", "rows_with_only_always_kept",
    *(f"share_{name}" for name in COMPONENTS), "failed",
)  # fmt: skip


def require_place(file: str) -> None:
    """Raise SettingsWrong, before anything is computed, where ``file`` cannot be written."""
    place = Path(file).expanduser()
    if not place.parent.is_dir() or place.is_dir():
        raise SettingsWrong([f"--csv {file}: is a directory, or lies in none that is there"])


def write_csv(file: str, found: ComparedMasks | None, failures: Sequence[PointFailure]) -> None:
    """One line per mask, of pairs per branch: FIRST, then every mask.* key; failed points last, with the reason.

    Fractions are between 0 and 1, losses in nats; an empty cell is no number. ``agreement`` is the Jaccard index with the
    line whose ``baseline`` is true.
    """
    lines = [_line(row, found) for row in found.rows] if found else []
    lines += [{"mask": failure.name, "failed": redacted(failure.reason)} for failure in failures]
    settings = list(dict.fromkeys(key for line in lines for key in line if key not in FIRST))
    with Path(file).expanduser().open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, [*FIRST, *settings], restval="")
        table.writeheader()
        table.writerows(lines)


def _line(row: ComparedMask, found: ComparedMasks) -> dict[str, Any]:
    summary, place = row.place.summary, row.place
    shares = row.contributions or {}
    line = {
        "run": redacted(place.storage.root),
        "mask": place.name,
        "branch": place.branch,
        "baseline": (place.storage.root, place.name) == (found.baseline.storage.root, found.baseline.name),
        **{name: summary[name] for name in COUNTS},
        "kept_fraction": row.kept_fraction,
        "agreement": row.agreement,
        "loss_of_kept": row.loss_of_kept,
        "rows_with_only_always_kept": row.only_always,
        **{f"share_{name}": share for name, share in shares.items()},
        **{f"mask.{key}": value for key, value in summary["settings"].items() if key != "name"},
    }
    lists = {key: " ".join(map(str, value)) for key, value in line.items() if isinstance(value, list)}
    return {key: value for key, value in {**line, **lists}.items() if value is not None}

"""The counts of prepare's rows that are held out or have a file of their own, and how counts are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from alphatoken.pipeline.prepare import remarks
from alphatoken.pipeline.prepare.held_out import PAIRS, RETENTION, TRIAL
from alphatoken.pipeline.prepare.outcome import NOTES


def held(name: str, counts: dict[str, Any]) -> Counter[str]:
    """The stage's counts of rows held out of the training data; of validation rows as pairs their number alone."""
    if name == PAIRS:
        return Counter({f"{name}_rows": counts["rows_used"]})
    found = Counter({f"{name}_rows": counts["rows_used"], "truncated": counts["truncated"]})
    found.update({key: n for key, n in counts.items() if key.startswith("note/") or remarks.is_remark(key)})
    return Counter({key: n for key, n in found.items() if n})


def of_validation(counts: Mapping[str, Any], file: str = "validation") -> Counter[str]:
    """The stage's counts of a file of its own; ``file``: what it is for, validation, trial or retention."""
    renamed = Counter({_renamed(key, file): n for key, n in counts.items()})
    renamed[f"{file}_rows"] = counts["rows_used"]
    return renamed


def _renamed(key: str, file: str) -> str:
    if remarks.is_remark(key):
        return key
    kind, mark, name = key.partition("/")
    return f"{kind}/{file} {name}" if mark else f"{file}_{key}"


def of_their_own(counts: Mapping[str, int]) -> str:
    said = ((TRIAL, "for trials"), (RETENTION, "for retention"))
    return "".join(f"{counts[f'{name}_rows']:,} {what}, " for name, what in said if counts.get(f"{name}_rows"))


def told_notes(notes: Mapping[str, int]) -> list[str]:
    """A line for each note that rows carry."""
    lines = []
    for note, count in notes.items():
        file, _, name = note.rpartition(" ")
        line = f"{NOTES.get(name, name)}: {count:,} row(s)"
        lines.append(f"data.{file}: {line}" if file else line)
    return lines


def listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())


def because(reasons: Sequence[str]) -> str:
    """Why rows were not used, for the end of a message: how many for which reason, and the first in full."""
    if not reasons:
        return ""
    counts = Counter(reason.partition(":")[0] for reason in reasons)
    return f" ({listed(dict(counts.most_common()))}; the first: {reasons[0]})"

"""What is worth knowing about masks, said once for all that share it, with their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

WARNED = "WARNING: "  # how notes of a mask begin that are one
NAMED = 8  # masks in one sentence
COUNT = re.compile(rf"((?:{WARNED})?(?:in )?)(\d[\d,]*(?: of \d[\d,]*)?) ")


def mask_label(mask: str, branch: str) -> str:
    """How a sentence names a mask, or one branch of a mask of pairs."""
    return f"{mask} ({branch})" if branch else mask


@dataclass(frozen=True, slots=True)
class Remark:
    """``first``: the note of the first mask. ``masks``: their names; where the notes begin with other numbers, each with its own."""

    first: str
    masks: str
    text: str


def each_once(noted: Iterable[tuple[str, str]]) -> list[Remark]:
    """``noted``: masks and their notes. Those that differ in the number alone that they begin with are one remark."""
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for mask, note in noted:
        counted = COUNT.match(note)
        shared = counted[1] + note[counted.end() :] if counted else note
        groups.setdefault(shared, []).append((mask, note, counted[2] if counted else ""))
    found = []
    for shared, own in groups.items():
        alike = len({note for _, note, _ in own}) == 1
        names = [mask if alike else f"{mask} ({count})" for mask, _, count in own]
        if len(names) > NAMED:
            names[NAMED:] = [f"{len(names) - NAMED} more"]
        title = "mask" if len(own) == 1 else "masks"
        found.append(Remark(own[0][1], f"{title} {', '.join(names)}", own[0][1] if alike else shared))
    return found

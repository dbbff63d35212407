"""Notes of which parts of a directory are complete, so that going on takes one listing and no look into each of them.

A driver writes a note, a hidden file beside the parts, whenever many more are complete. A note is believed of a part that
has the size noted and was not written later than the note: what was replaced, cut off or copied since is opened as
where there is no note. Directories of fewer than NOTED_FROM parts have none: opening those takes a tenth of a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alphatoken.pipeline.run.storage import Storage

NOTED_FROM = 1000  # parts
GROWTH = 4  # a note is due when the parts that are not noted are a fourth of those that are
PREFIX = ".complete-"


@dataclass(frozen=True, slots=True)
class Listed:
    """What a listing says of a file: seconds since 1970 at which it was written, by the clock of the disk or store; bytes."""

    modified: float
    size: int


@dataclass(frozen=True, slots=True)
class Footer:
    """What a complete part says at its end: its rows, and what was counted when it was written (empty: nothing was)."""

    rows: int
    counts: dict[str, Any]


def believed(storage: Storage, directory: str, listed: Mapping[str, Listed], fingerprint: str) -> dict[str, Footer]:
    """Part -> footer, of the parts below ``directory`` that the notes there speak of and that were not touched since.

    ``listed``: relative name -> what the listing says.
    """
    found: dict[str, Footer] = {}
    keys: dict[str, str] = {}  # one string for each key of all counts
    for name, note in listed.items():
        if not name.startswith(f"{directory}/{PREFIX}"):
            continue
        try:
            content = storage.read_json(name)
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # not what this program leaves there: the parts will be opened
        if content.get("fingerprint") != fingerprint:
            continue
        for part, (rows, size, counts) in content["parts"].items():
            there = listed.get(f"{directory}/{part}")
            if there is not None and there.size == size and there.modified <= note.modified:
                found[part] = Footer(rows, {keys.setdefault(key, key): one for key, one in counts.items()})
    return found


class Notes:
    """Of one directory, while a stage writes it. ``total``: parts that there will be."""

    def __init__(self, storage: Storage, directory: str, fingerprint: str, total: int) -> None:
        self.storage, self.directory, self.fingerprint = storage, directory, fingerprint
        self.wanted = total >= NOTED_FROM
        self.noted = 0
        self.waiting: dict[str, Footer] = {}

    def add(self, part: str, rows: int, counts: dict[str, Any]) -> None:
        """A part is complete; ``counts``: what it was written with."""
        if not self.wanted:
            return
        self.waiting[part] = Footer(rows, counts)
        if len(self.waiting) >= max(NOTED_FROM, self.noted // GROWTH):
            self.write()

    def write(self) -> None:
        """Note what has not been noted yet."""
        if not self.waiting:
            return
        listed = self.storage.listed(self.directory)
        parts = {
            part: [footer.rows, there.size, footer.counts]
            for part, footer in self.waiting.items()
            if (there := listed.get(f"{self.directory}/{part}")) is not None
        }
        earlier = [int(name.rpartition("-")[2].partition(".")[0]) for name in listed if f"/{PREFIX}" in name]
        content = json.dumps({"fingerprint": self.fingerprint, "parts": parts}, separators=(",", ":"))
        place = f"{self.directory}/{PREFIX}{max(earlier, default=-1) + 1:05d}.json"
        self.storage.write_bytes(place, content.encode())
        self.noted += len(self.waiting)
        self.waiting = {}

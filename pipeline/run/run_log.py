"""metrics.jsonl: what a run did and how fast, one JSON object a line, for plots and for questions afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.run.tracker import Tracker

NAME = "metrics.jsonl"


class RunLog:
    """Appends to metrics.jsonl of a run directory, and sends the numbers on to a tracker where there is one.

    On a local disk every line is there at once; an object store cannot append, so that there the lines since the last
    ``flush`` are in memory. Earlier lines of a continued run stay.
    """

    def __init__(self, storage: Storage, tracker: Tracker | None = None) -> None:
        self.storage, self.tracker = storage, tracker
        self.waiting: list[str] = []

    def event(self, kind: str, name: str, **facts: Any) -> None:
        """Add one line: ``{"time", "event": kind, "name", ...facts}``. ``kind``: progress | task | stage."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": kind, "name": name, **facts}
        self.waiting.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        if self.storage.local:
            self.flush()
        if self.tracker:
            place = f"{kind}/{name}" if kind == "stage" else name
            self.tracker.log({f"{place}/{key}".replace(": ", "/"): n for key, n in numbers(facts).items()})

    def flush(self) -> None:
        """Write what waits."""
        if not self.waiting:
            return
        new, self.waiting = "".join(self.waiting), []
        if self.storage.local:
            path = Path(self.storage.path(NAME))
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(new)
            return
        before = self.storage.read_bytes(NAME) if self.storage.exists(NAME) else b""
        self.storage.write_bytes(NAME, before + new.encode())


def numbers(facts: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested mapping under dotted keys; all else is left out."""
    found: dict[str, float] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            found.update(numbers(value, f"{prefix}{key}."))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found

"""Whether a directory holds a run, and what is said where it does not: the same by every command."""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path

from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import MANIFEST, Storage

MOST_NAMED = 4  # runs in a line


def require_run(storage: Storage, asked: str, key: str = "") -> None:
    """Raise RunFailed where ``storage`` holds no run, with those that lie beside it.

    ``asked``: the place as it was typed; ``key``: what stood before it, such as `run.dir=`.
    """
    if storage.exists(MANIFEST):
        return
    what = "holds no run" if storage.exists("") else "there is no such directory"
    beside = [] if "://" in asked else [str(one.parent) for one in Path(asked).parent.glob(f"*/{MANIFEST}")]
    near = sorted(beside, key=lambda run: (-SequenceMatcher(None, run, asked).ratio(), run))
    more = f" and {len(near) - MOST_NAMED:,} more" if len(near) > MOST_NAMED else ""
    there = f"; runs beside it: {', '.join(near[:MOST_NAMED])}{more}" if near else ""
    raise RunFailed(f"{key}{asked}: {what}{there}: give the directory of a run, or run `alphatoken run` first")

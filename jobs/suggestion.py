"""What somebody may have meant who typed a key, a group or a command that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Collection

# The keys that most people set, in the order in which they are offered.
COMMON = (
    "run.dir", "run.overwrite", "model.policy", "model.reference", "data.train", "data.validation", "data.max_length",
    "anchor.drift", "valuation.scores", "mask.score", "mask.rho", "mask.scope", "mask.min_kept", "mask.name", "trial.masks",
    "cluster.address", "log_level", "debug",
)  # fmt: skip
# Group -> the key of it that takes a value of one's own, where a choice of the group was expected.
OWN_VALUE = {
    "model": "model.policy", "data": "data.train", "mask": "mask.score", "anchor": "anchor.drift",
    "valuation": "valuation.scores", "cluster": "cluster.address", "trial": "trial.masks", "run": "run.dir",
}  # fmt: skip
MOST = 3  # suggestions


def near(key: str, known: Collection[str]) -> str:
    """``; did you mean ...?`` for a key that is not among ``known``, '' where nothing is like it."""
    found = _same_last_word(key, known)
    if not found and key in OWN_VALUE:
        found = [OWN_VALUE[key]]
    found = found or difflib.get_close_matches(key, known, n=1)
    if not found:  # `mask.rhoo`, `rhoo`
        last = {one.rpartition(".")[2] for one in known}
        found = [
            k
            for word in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)
            for k in _same_last_word(word, known)
        ]
    return f"; did you mean {' or '.join(found[:MOST])}?" if found else ""


def siblings(key: str, known: Collection[str]) -> str:
    """``; keys of mask: ...`` for a key of a group that exists, else ''."""
    prefix = key.rpartition(".")[0]
    there = [one.removeprefix(f"{prefix}.") for one in known if prefix and one.startswith(f"{prefix}.")]
    return f"; keys of {prefix}: {', '.join(there)}" if there else ""


def near_word(word: str, known: Collection[str]) -> str:
    """``; did you mean ...?`` for a command or an option."""
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _same_last_word(key: str, known: Collection[str]) -> list[str]:
    """Keys that end in the same word, the usual ones and the shallow ones first."""
    found = [one for one in known if one.rpartition(".")[2] == key.rpartition(".")[2] and one != key]
    return sorted(found, key=lambda one: (one not in COMMON, one.count("."), one))

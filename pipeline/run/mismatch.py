"""What differs between the inputs that a stage was begun with and those of now, for people.

Fingerprints look alike however much differs behind them: beside them stands what was seen of the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alphatoken.pipeline.run.fingerprint import differences

LONGEST = 60  # characters of a value in a message
SHORT = 8  # characters of a fingerprint that tell it from another
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def mismatch(stage: str, record: Mapping[str, Any], inputs: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """One line for every input that differs. ``about``: input -> what its files are, of now; the record has those of then."""
    before, lines = record.get("about", {}), []
    for key, old, new in differences(record["inputs"], dict(inputs)):
        was, now = _apart(old, new), _apart(new, old)
        if key in about and key in before:
            was, now = before[key], about[key]
            if was == now:  # the content alone is another
                was, now = f"{was}, content {_fingerprints(old)}", f"{now}, content {_fingerprints(new)}"
        lines.append(f"{stage}: {key} was {was}, now {now}")
    return lines


def _fingerprints(value: Any) -> str:
    return ", ".join(str(one)[:SHORT] for one in value) if isinstance(value, list) else str(value)[:SHORT]


def _apart(value: Any, other: Any) -> str:
    """``value`` in a line; of two lists that are too long for it what they do not share."""
    if isinstance(value, str) and _FINGERPRINT.fullmatch(value):
        return f"fingerprint {value[:SHORT]}"
    if isinstance(value, list) and isinstance(other, list) and max(len(str(value)), len(str(other))) > LONGEST:
        own = [one[:SHORT] if _FINGERPRINT.fullmatch(str(one)) else repr(one) for one in value if one not in other]
        return _short(f"[{', '.join(['...', *own])}]")
    return _short(value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."

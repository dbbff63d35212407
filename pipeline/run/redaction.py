"""Secrets do not leave the process: URIs and texts without the credentials in them."""

from __future__ import annotations

import os
import re
from typing import Any

_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/@\s'\"]+@")
_SECRET_WORDS = "key|secret|token|password|passwd|signature|credential|sas|sig"
_PARAMETER = re.compile(rf"([?&][^=&\s]*(?:{_SECRET_WORDS})[^=&\s]*=)[^&\s'\",;]+", re.IGNORECASE)
_VARIABLE = re.compile(rf"(?:^|_)(?:{_SECRET_WORDS})s?(?:_|$)", re.IGNORECASE)
SHORTEST = 8  # a shorter value of such a variable is no secret, and might be part of any word
HIDDEN = "***"


def redacted(text: str) -> str:
    """``text`` without user names and passwords of URIs, secret parameters, and values of secret variables.

    A variable of the environment is secret when its name says so (KEY, SECRET, TOKEN, PASSWORD and the like).
    """
    text = _PARAMETER.sub(rf"\g<1>{HIDDEN}", _USER.sub(rf"\g<1>{HIDDEN}@", text))
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and _VARIABLE.search(name) and not os.path.exists(value):
            text = text.replace(value, HIDDEN)
    return text


def without_secrets(value: Any) -> Any:
    """A JSON value with every string in it redacted."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list | tuple) else value

"""What is missing where a Ray cluster wants a token. No Ray here.

`ray start` turns token authentication on by itself from Ray 2.60 on, with the token of the user who started the head.
"""

from __future__ import annotations

import os
from pathlib import Path

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
DEFAULT_TOKEN = "~/.ray/auth_token"
# What a cluster answers without a token and with another one than its own, and what Ray says before it asks anybody.
SIGNS = (
    "status code 401", "status code 403", "status 401", "status 403", "unauthorized", "unauthenticated", "forbidden",
    "authentication required", "authentication failed", "token authentication",
)  # fmt: skip


def about_token(answer: str) -> str:
    """What to set for a cluster that answers so, after its name in a sentence; '' where its token is not the matter."""
    if not any(sign in answer.lower() for sign in SIGNS):
        return ""
    asks = os.environ.get(MODE) == "token"
    given = os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH) or Path(DEFAULT_TOKEN).expanduser().is_file()
    if asks and given:
        return f"does not take the token of {TOKEN}, {TOKEN_PATH} or {DEFAULT_TOKEN}: give that of the head's user"
    wanted = [] if asks else [f"{MODE}=token"]
    wanted += [] if given else [f"{TOKEN_PATH}=FILE with the token of the head's user ({DEFAULT_TOKEN} there)"]
    return f"wants a token: set {' and '.join(wanted)}"


def token_hint() -> str:
    """For a cluster that says nothing of why it does not answer, as one does that was joined without its token."""
    if os.environ.get(MODE) == "token":
        return f", and is the token of {TOKEN}, {TOKEN_PATH} or {DEFAULT_TOKEN} that of the head's user"
    return f", and does it want a token (then set {MODE}=token and {TOKEN_PATH})"

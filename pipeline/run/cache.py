"""Where downloads are kept between runs."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$ALPHATOKEN_CACHE, else alphatoken in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ALPHATOKEN_CACHE") or Path(base) / "alphatoken")

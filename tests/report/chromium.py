"""A real Chromium without a window, and the promise that a page that it shows loads nothing and complains of nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser that ALPHATOKEN_CHROMIUM names, else the one on the path."""
    place = os.environ.get("ALPHATOKEN_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not place:
        pytest.fail(
            "no Chromium: install it (`apt-get install chromium`) or name one in ALPHATOKEN_CHROMIUM", pytrace=False
        )
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as library:
        browser = library.chromium.launch(executable_path=place, args=arguments)
        yield browser
        browser.close()


@contextmanager
def looking_at(browser: Browser, file: Path, **context) -> Iterator[Page]:
    """The file opened from the disk; afterwards: no message, no error, no dialog, no request but for the file itself."""
    own = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **context})
    page = own.new_page()
    heard: list[str] = []
    page.on("console", lambda message: heard.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: heard.append(f"request: {request.url}"))
    page.goto(file.as_uri())
    yield page
    own.close()
    assert heard == [f"request: {file.as_uri()}"]

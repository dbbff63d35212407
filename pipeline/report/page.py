"""Puts a report together into one file that opens from a disk: style and script inline, nothing from outside.

The content security policy lets run exactly this script and this style, by their hashes, and lets load nothing at all.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from alphatoken.pipeline.report.payload import as_script

FOLDER = "html"
STYLE = "page.css"
# In the order in which they stand in the page; each is given what the ones before it define.
SCRIPTS = ("data.js", "elements.js", "tokens.js", "rows.js", "charts.js", "tables.js", "start.js")


class Page:
    """A template filled with ``facts``, everything but the data of the script."""

    def __init__(self, facts: dict[str, Any]) -> None:
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["percent"] = lambda share: f"{share:.1%}"
        environment.filters["short"] = lambda number: f"{number:.3g}"
        environment.filters["spread"] = lambda pair: f"{pair[0]:.4f} ± {pair[1]:.4f}"
        environment.filters["number"] = lambda number: f"{number:,}"
        script = "'use strict';\n(() => {\n" + "".join(_file(name) for name in SCRIPTS) + "})();\n"
        self.template, self.facts = environment.from_string(_file("report.html.jinja")), facts
        self.inline = {"style": _element(_file(STYLE)), "script": _element(script)}
        self.policy = "; ".join((
            "default-src 'none'", f"script-src '{_hash(script)}'", f"style-src '{_hash(_file(STYLE))}'",
            "img-src data:", "base-uri 'none'", "form-action 'none'",
        ))  # fmt: skip

    def render(self, data: dict[str, Any]) -> str:
        """The page with ``data`` for its script."""
        own = {"policy": self.policy, "data": Markup(as_script(data)), **self.inline}
        return self.template.render(**self.facts, **own)


def _file(name: str) -> str:
    return files(__package__).joinpath(f"{FOLDER}/{name}").read_text(encoding="utf-8")


def _element(text: str) -> Markup:
    """Our own text, as it stands in an element; it must not end the element."""
    assert "</" not in text, "a style or script of the page holds the beginning of an end tag"
    return Markup(text)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"

"""The data-set card of a mask: with its front matter `load_dataset("<directory>")` finds the parts and nothing else."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

import jinja2
import pyarrow as pa

from alphatoken.data_schemas import MASK_EXTRA_COLUMNS
from alphatoken.pipeline.run.fingerprint import digest

TEMPLATES = {"sft": "card.md.jinja", "preference": "preference_card.md.jinja"}


def card(summary: dict[str, Any], schema: pa.Schema, fingerprint: str) -> str:
    """The README.md of a mask: columns, alignment, what was kept, and how to train on it.

    ``summary``: as in summary.json; ``schema``, ``fingerprint``: of the parts. Says nothing that changes from run to
    run. The configuration's description is a digest of the mask's content: `load_dataset` looks up a directory with a card
    in its cache by the directory's last name and by what the card says of the configurations, not by what the files hold,
    and would give the masks of another run.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; what a user typed goes through `quoted` or a fenced block of JSON
    )  # fmt: skip
    environment.filters["quoted"] = _quoted
    template = environment.from_string(
        files(__package__).joinpath(TEMPLATES[summary.get("format", "sft")]).read_text(encoding="utf-8")
    )
    return template.render(
        identity=digest([fingerprint, summary])[:12],
        summary=summary,
        settings=summary["settings"],
        settings_json=json.dumps(summary["settings"], indent=2, ensure_ascii=False),
        columns=schema.names,
        extra=[name for name in MASK_EXTRA_COLUMNS if f"chosen_{name}" in schema.names],
        version=_version(),
    )


def _quoted(text: str) -> str:
    """A YAML double-quoted scalar: JSON strings are."""
    return json.dumps(text, ensure_ascii=False)


def _version() -> str:
    try:
        return version("alphatoken")
    except PackageNotFoundError:
        return "not installed as a package"

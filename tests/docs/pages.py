"""What stands on the pages for users: README.md, CONTRIBUTING.md and docs/*.md."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# bash that runs nothing: whatever is no builtin is written down with its words, each line of a block by its own
RECORDER = r"""
PATH=/nowhere
command_not_found_handle() { printf '%s\0' "$@" >&3; printf '\n\0' >&3; }
touch() { command_not_found_handle touch "$@"; }
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str


def name_of(page: Path) -> str:
    """As a test's parameter."""
    return str(page.relative_to(ROOT))


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page or of a part of it, in order."""
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """Anchor -> what stands under its heading, down to the next one of any depth."""
    found = re.findall(r"^#+ (.+)\n((?:(?!#+ ).*\n?)*)", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"): below for heading, below in found}


def commands(text: str) -> list[list[str]]:
    """The words of every command in the bash blocks of a page, as bash splits and expands them."""
    found: list[list[str]] = []
    for block in blocks(text):
        if block.language == "bash":
            done = subprocess.run(
                ["/bin/bash", "-c", RECORDER + 'exec 3>&1 1>&2\n. /dev/stdin <<"END"\n' + block.text + "END\n"],
                capture_output=True,
                text=True,
                timeout=20,
            )
            assert "syntax error" not in done.stderr, done.stderr
            found += [line.split("\0")[:-1] for line in done.stdout.split("\n\0") if line]
    return found

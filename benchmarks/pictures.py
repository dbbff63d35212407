"""The pictures of the report and of `alphatoken inspect`: `python -m benchmarks.pictures RUN [--row 74] [--mask default,paper]`.

RUN is a finished run of the embedded example with both masks, and its report. The one row with the id that ends in `:ROW` is
shown as users see it: in a headless Chromium, with the numbers of a token (docs/images/report.png), and in a terminal of 80
columns, as rich exports it (docs/images/inspect.svg). No directory of the machine is in either: ids are shown without that of
their file, and the command in the terminal as one for runs/demo.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from playwright.sync_api import Page
from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

from tests.report.chromium import chromium, looking_at

IMAGES = Path("docs/images")
SHOWN_AS = "runs/demo"
COLUMNS = 80
SIZE = {"width": 1200, "height": 860}
OWN_FONTS = "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"  # nothing is loaded from elsewhere


def row_id(run: Path, number: str) -> str:
    """The id that ends in ``:number``."""
    ids = [
        i for part in sorted((run / "prepared").glob("part-*.parquet")) for i in pq.read_table(part)["id"].to_pylist()
    ]
    found = [one for one in ids if one.endswith(f":{number}")]
    if not found:
        raise SystemExit(f"{run}: no row whose id ends in :{number}")
    return found[0]


def in_the_report(page: Page, row: str, masks: tuple[str, str], token: int) -> bytes:
    """A PNG of one row under two masks, below the bar that stays at the top; the pointer is on response token ``token``."""
    page.select_option("#mask-a", label=masks[0])
    page.select_option("#mask-b", label=masks[1])
    page.fill("#query", row)
    block = page.locator(".row").first
    assert block.locator("h3").inner_text().startswith(f"{row} ")
    block.locator("h3").evaluate("(one, name) => { one.firstChild.data = name; }", Path(row).name)
    bar = page.locator("#controls").bounding_box()
    block.evaluate("(one, under) => scrollTo(0, scrollY + one.getBoundingClientRect().top - under)", bar["height"] + 16)
    block.locator(".side").first.locator("[data-i]").nth(token).hover()
    page.locator("#tip").wait_for()
    return page.screenshot()


def in_a_terminal(run: Path, row: str, masks: tuple[str, str]) -> str:
    """An SVG of what `alphatoken inspect` prints for the row, below the command."""
    words = ["inspect", str(run), "--row", row, "--mask", ",".join(masks)]
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    environment |= {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "alphatoken.jobs", *words]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout.decode()
    words[1], words[3], said = SHOWN_AS, Path(row).name, said.replace(row, Path(row).name)
    console = Console(record=True, width=COLUMNS, color_system="256", force_terminal=True, file=io.StringIO())
    console.print(Text(f"$ alphatoken {' '.join(words)}\n", "bold"))
    console.print(Text.from_ansi(said.strip()), soft_wrap=True)
    return console.export_svg(title="alphatoken inspect", code_format=svg_format(), unique_id="inspect")


def svg_format() -> str:
    """rich's, without fonts from elsewhere."""
    without = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return without.replace("Fira Code, monospace", OWN_FONTS)


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description="The pictures of the report and of inspect.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--row", default="74", help="the number at the end of the row's id")
    parser.add_argument("--token", type=int, default=6, help="of the response, from 0: whose numbers are shown")
    parser.add_argument("--mask", default="default,paper")
    parser.add_argument("--write", type=Path, default=IMAGES)
    asked = parser.parse_args()
    row, (first, second) = row_id(asked.run, asked.row), asked.mask.split(",")
    report = (asked.run / "report/index.html").resolve()
    with chromium() as browser, looking_at(browser, report, viewport=SIZE, color_scheme="light") as page:
        (asked.write / "report.png").write_bytes(in_the_report(page, row, (first, second), asked.token))
    (asked.write / "inspect.svg").write_text(in_a_terminal(asked.run, row, (first, second)), encoding="utf-8")
    print(f"{asked.write}/report.png and inspect.svg: {row} under {first} and {second}")


if __name__ == "__main__":
    main()

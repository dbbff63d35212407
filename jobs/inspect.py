"""alphatoken inspect: rows of a run with their values, in the terminal. Reads only, and needs no model but its tokenizer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from alphatoken.jobs.tool_arguments import ToolArguments
from alphatoken.pipeline.report.content import RowContent, Window
from alphatoken.pipeline.report.find import AFFECTED, by_id, changed, top, ways
from alphatoken.pipeline.report.reading import Reading
from alphatoken.pipeline.report.shown_masks import ShownMask, finished, shown_masks
from alphatoken.pipeline.report.terminal import Colours, Shown, print_rows
from alphatoken.pipeline.report.texts import Texts
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.presence import require_run
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

SHORT = Window(before=60, after=400)
MOST_MASKS = 4


def execute(arguments: Sequence[str]) -> int:
    """Print the rows that are asked for."""
    asked = parser().parse_args(list(arguments))
    run = _run(asked.run.removeprefix("run.dir="))
    masks = _masks(run, asked)
    reading = Reading(run, masks)
    for option, name, choices in (("--by", asked.by, ways(reading)), ("--colour", asked.colour, reading.scores)):
        if name is not None and name not in choices:
            raise SettingsWrong([f"alphatoken inspect {option} {name}: choices: {', '.join(choices) or 'none'}"])
    with run.progress:
        rows = _rows(reading, asked, run.progress)
    colour = (
        asked.colour or (asked.by if asked.by in reading.scores else masks[0].score) or next(iter(reading.scores), None)
    )
    texts = Texts.of(run.manifest)
    if texts.trouble:
        run.progress.say(texts.trouble)
    shown = Shown(
        tuple(mask.name for mask in masks), reading.branches, texts,
        Colours.of(colour, rows) if colour else None, asked.values,
    )  # fmt: skip
    print_rows(Console(), rows, shown)
    return 0


def _rows(reading: Reading, asked: argparse.Namespace, progress: Progress) -> list[RowContent]:
    window = Window() if asked.whole else SHORT
    if asked.row:
        return by_id(reading, asked.row, window)
    if asked.changed:
        rows, of = changed(reading, asked.top, window, progress)
        progress.say(
            f"{len(rows)} of the {of:,} rows that {' and '.join(asked.changed)} decide differently, of {reading.total:,}"
        )
        return rows
    by = asked.by or AFFECTED
    rows, of = top(reading, by, asked.top, window, progress)
    progress.say(f"{len(rows)} of {of:,} rows, by {by}")
    return rows


def _masks(run: Run, asked: argparse.Namespace) -> list[ShownMask]:
    """Those that are asked for; else all, the first few. Raises SettingsWrong for one that is not there."""
    there = finished(run)
    names = asked.changed or asked.mask or there[:MOST_MASKS]
    if wrong := [name for name in names if name not in there]:
        raise SettingsWrong([f"{run.storage.root} has no mask {', '.join(wrong)}; it has {', '.join(there)}"])
    if not asked.changed and not asked.mask and len(there) > MOST_MASKS:
        run.progress.say(f"{len(there) - MOST_MASKS} more masks are there: --mask {','.join(there[MOST_MASKS:])}")
    return shown_masks(run, names)


def _run(directory: str) -> Run:
    storage = Storage(directory)
    require_run(storage, directory)
    return Run(storage, Manifest(storage), Settings(), Progress())


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name for name in text.split(",") if name))


def _two(text: str) -> list[str]:
    names = _names(text)
    if len(names) != 2:
        raise argparse.ArgumentTypeError("give two different masks, as default,paper")
    return names


def _some(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: give a whole number above 0")
    return int(text)


def parser() -> ToolArguments:
    """What the command takes."""
    parser = ToolArguments("inspect")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--row", action="append")
    parser.add_argument("--top", type=_some, default=5)
    parser.add_argument("--by")
    parser.add_argument("--changed", type=_two)
    parser.add_argument("--mask", type=_names)
    parser.add_argument("--colour", "--color")
    parser.add_argument("--values", action="store_true")
    parser.add_argument("--whole", action="store_true")
    return parser


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["inspect", *sys.argv[1:]]))

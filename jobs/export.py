"""alphatoken export: a mask in the shape that another trainer reads. Loads no model, starts no worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from alphatoken.jobs.tool_arguments import ToolArguments
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.redaction import redacted
from alphatoken.pipeline.run.remote import is_remote

MASK = "default"


def parser() -> ToolArguments:
    """What the command takes."""
    # On demand: the command line itself needs neither tables nor arrays.
    from alphatoken.pipeline.trainers.formats import FORMATS

    parser = ToolArguments("export")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--mask", default=MASK)
    parser.add_argument("--to", required=True, choices=list(FORMATS))
    parser.add_argument("--out", help="default: RUN/export/MASK-FORMAT, of jsonl data.jsonl in it")
    return parser


def execute(arguments: Sequence[str]) -> int:
    """Write the files, and say where they are and how they are read."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from alphatoken.pipeline.trainers.formats import FORMATS, export
    from alphatoken.pipeline.trainers.source import open_mask

    given = parser().parse_args(list(arguments))
    out = Path(_on_disk(given.out or _place(given.run, given.mask, given.to))).expanduser()
    made = export(open_mask(given.run, given.mask), given.to, out)
    share = made.kept / made.tokens if made.tokens else 0.0
    print(f"files: {redacted(str(out))}")
    print(f"rows:  {made.rows:,} with {made.tokens:,} tokens, of which {made.kept:,} ({share:.1%}) are in the loss")
    print(f"next:  {FORMATS[given.to].reading.format(out=out)}")
    return 0


def _on_disk(place: str) -> str:
    """``place`` as a path. Raises SettingsWrong for one in an object store, which no trainer of these formats reads."""
    path = place.removeprefix("file://")
    if "://" in path:
        raise SettingsWrong([f"--out {redacted(place)}: is not on this disk: give a path, and copy from there"])
    return path


def _place(run: str, mask: str, to: str) -> str:
    """Where the files go without --out. Raises SettingsWrong for a run that is not on this disk."""
    if is_remote(run):
        raise SettingsWrong(["alphatoken export: a run in an object store needs a place for the files: give --out"])
    return f"{run}/export/{mask}-{to}" + ("/data.jsonl" if to == "jsonl" else "")

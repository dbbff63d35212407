"""Which files below a directory are data: not those of runs, not those that hide themselves, not those that describe others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from alphatoken.pipeline.run.manifest import NAME

# What stands beside data and is none, though its ending is that of data: of `datasets` on disk and on the hub.
CARDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
README, SUMMARY = "README.md", "summary.json"  # the card of a mask, and what stands beside it
MARKS = (NAME, README)  # what tells of a directory what it is
SHOWN = 4  # names in a line


@dataclass(frozen=True, slots=True)
class Scan:
    """``wanted``: the data, as given, in their order. ``skipped``: what is not read, a sentence for each kind."""

    wanted: tuple[PurePosixPath, ...]
    skipped: tuple[str, ...]


def scan(
    files: Sequence[PurePosixPath],
    is_data: Callable[[PurePosixPath], bool],
    known: str,
    beside: Sequence[PurePosixPath] = (),
) -> Scan:
    """Tell the data among ``files``, which are relative to the directory that was named.

    ``is_data``: whether the ending is that of a format; ``known``: those endings, for the sentence. ``beside``: files that
    were not asked for, of which some may say what the others are. A directory with a run.json is one of a run, whose
    prepared rows and masks would be read as if they were new data.
    """
    runs = {file.parent for file in (*files, *beside) if file.name == NAME}
    masks = {file.parent for file in (*files, *beside) if file.name == README}
    inside: dict[PurePosixPath, int] = {}
    hidden: dict[PurePosixPath, int] = {}
    others: list[str] = []
    wanted = []
    for file in files:
        run = next((parent for parent in reversed(file.parents) if parent in runs), None)
        dots = [PurePosixPath(*file.parts[: i + 1]) for i, part in enumerate(file.parts[:-1]) if part.startswith(".")]
        if run is not None:
            inside[run] = inside.get(run, 0) + 1
        elif dots:
            if is_data(file):
                hidden[dots[0]] = hidden.get(dots[0], 0) + 1
        elif not is_data(file):
            others += [] if file.name.startswith(".") else [str(file)]
        elif file.name.startswith(".") or file.name in CARDS or (file.name == SUMMARY and file.parent in masks):
            others.append(str(file))
        else:
            wanted.append(file)
    skipped = []
    if inside:
        skipped.append(f"{_many(len(inside), 'run director', 'y', 'ies')} skipped: {_listed(map(str, inside))}")
    if hidden:
        skipped.append(f"{_many(len(hidden), 'hidden director', 'y', 'ies')} skipped: {_listed(map(str, hidden))}")
    if others:
        skipped.append(f"{_many(len(others), 'file', '', 's')} skipped: {_listed(others)} (read are {known})")
    return Scan(tuple(wanted), tuple(skipped))


def _many(count: int, word: str, one: str, several: str) -> str:
    return f"{count:,} {word}{one if count == 1 else several}"


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:SHOWN]) + (", ..." if len(ordered) > SHOWN else "")

"""What `submit` sends of the working directory: no runs, no caches, no environments, nothing that .gitignore names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pathspec

from alphatoken.pipeline.run.cache import cache_directory
from alphatoken.pipeline.run.manifest import NAME

ALWAYS = (".git", "__pycache__")
# A directory with one of these in it is, in this order, a run, a cache (bford.info/cachedir) or a virtual environment.
MARKS = (NAME, "CACHEDIR.TAG", "pyvenv.cfg")
CACHES = (".cache", ".venv", "node_modules")  # which do not always carry a mark
SHOWN = 3  # directories in a line


@dataclass(frozen=True, slots=True)
class Packed:
    """``excludes``: patterns as in a .gitignore, beside those that are there; ``left_out``: directories that they name.

    ``sizes``: bytes that are sent of every directory at the top, and of the files there under ``.``.
    """

    excludes: tuple[str, ...]
    left_out: tuple[str, ...]
    sizes: dict[str, int]

    def told(self) -> list[str]:
        """What is sent and what is not, a line each."""
        lines = []
        if self.left_out:
            more = f" and {len(self.left_out) - SHOWN:,} more" if len(self.left_out) > SHOWN else ""
            lines.append(f"not sent: runs, caches and environments: {', '.join(self.left_out[:SHOWN])}{more}")
        return [*lines, f"sent: {self.size_told()}"]

    def size_told(self) -> str:
        """How much is sent before it is compressed, and where most of it lies."""
        largest = sorted(self.sizes.items(), key=lambda item: -item[1])[:SHOWN]
        shown = ", ".join(f"{name} {_megabytes(size)}" for name, size in largest if size)
        return f"the working directory, {_megabytes(sum(self.sizes.values()))}" + (f" ({shown})" if shown else "")


def what_is_packed(directory: Path) -> Packed:
    """Look through ``directory`` once; links are not followed, as Ray does not."""
    left_out: list[str] = []
    sizes: dict[str, int] = {}
    for place, size in _walk(directory, directory, [], left_out):
        top = place.parts[0] if len(place.parts) > 1 else "."
        sizes[top] = sizes.get(top, 0) + size
    excludes = (*ALWAYS, *(f"/{_escaped(name)}/" for name in left_out))
    return Packed(excludes, tuple(left_out), sizes)


def _walk(
    root: Path, place: Path, ignored: list[tuple[Path, pathspec.GitIgnoreSpec]], left_out: list[str]
) -> Iterator[tuple[Path, int]]:
    """Files that are sent, relative to ``root``, with their bytes."""
    own = place / ".gitignore"
    if own.is_file():
        lines = own.read_text(encoding="utf-8", errors="replace").splitlines()
        ignored = [*ignored, (place, pathspec.GitIgnoreSpec.from_lines(lines))]
    for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
        path = Path(entry.path)
        is_directory = entry.is_dir(follow_symlinks=False)
        if entry.name in ALWAYS or _is_ignored(path, is_directory, ignored):
            continue
        if not is_directory:
            yield path.relative_to(root), entry.stat(follow_symlinks=False).st_size
        elif _is_left_out(path):
            left_out.append(path.relative_to(root).as_posix())
        else:
            yield from _walk(root, path, ignored, left_out)


def _is_left_out(path: Path) -> bool:
    return path.name in CACHES or path == cache_directory() or any((path / mark).is_file() for mark in MARKS)


def _is_ignored(path: Path, is_directory: bool, ignored: list[tuple[Path, pathspec.GitIgnoreSpec]]) -> bool:
    return any(spec.match_file(path.relative_to(top).as_posix() + "/" * is_directory) for top, spec in ignored)


def _escaped(name: str) -> str:
    """A path as a pattern that means itself."""
    return "".join(f"\\{character}" if character in "*?[]\\!# " else character for character in name)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"

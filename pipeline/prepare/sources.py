"""Raw rows: files, globs, directories and hub ids become `datasets.Dataset`s of known length, one per file.

Text formats become data sets with one column `json` that holds a row as text, decoded where it is tokenized (`decoding`): a broken
line then is one row for the quarantine and not the end of a file. Parquet and Arrow keep their typed columns.
"""

from __future__ import annotations

import csv
import fnmatch
import glob
import io
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError

from alphatoken.pipeline.prepare.compressed import BROKEN, COMPRESSIONS, opened, suffixes
from alphatoken.pipeline.prepare.decoding import LONGEST_LINE, TEXT, TOO_LONG, TOO_MANY_FIELDS
from alphatoken.pipeline.prepare.scan import MARKS, SHOWN, scan
from alphatoken.pipeline.prepare.typed import structs_of_tools
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.fingerprint import of_file
from alphatoken.pipeline.run.redaction import redacted
from alphatoken.pipeline.run.remote import RemoteFile, Unreachable, is_remote, list_files
from alphatoken.pipeline.run.seen import seen_of_file

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
KNOWN = f"{', '.join(sorted(FORMATS))}, those of text also with {', '.join(COMPRESSIONS)}"
READER = 3  # counts up when the rows of a file are read differently, since they are cached


@dataclass(frozen=True, slots=True)
class Source:
    """One file (or one hub data set): its name in reports, its rows, and a fingerprint of its content.

    ``about``: size and time of its last change, for people; empty where they are not known.
    """

    name: str
    rows: datasets.Dataset
    fingerprint: str
    about: str = ""

    def table(self, rows: Sequence[int]) -> pa.Table:
        """Some rows as an Arrow table, in one piece: rows that do not follow each other are found one by one, and to send
        pieces of one row costs more than the rows."""
        return self.rows.with_format("arrow")[list(rows)].combine_chunks()


@dataclass(frozen=True, slots=True)
class Sources:
    """All rows of a data set, numbered from 0 over its files in order.

    ``remarks``: what is to be said of how they were read, a line each.
    """

    files: tuple[Source, ...]
    remarks: tuple[str, ...] = ()

    @property
    def starts(self) -> list[int]:
        """The first global row number of every file, and the total at the end."""
        starts = [0]
        for file in self.files:
            starts.append(starts[-1] + len(file.rows))
        return starts

    def about(self) -> str:
        """The files with what is seen of them from outside, in one line."""
        shown = [f"{file.name} ({file.about})" if file.about else file.name for file in self.files[:SHOWN]]
        return ", ".join(shown) + (f" and {len(self.files) - SHOWN:,} more" if len(self.files) > SHOWN else "")

    def named(self, names: Sequence[str]) -> Sources:
        """The same files under other names in reports and identifiers."""
        files = tuple(replace(file, name=name) for file, name in zip(self.files, names, strict=True))
        return replace(self, files=files)

    def pieces(self, rows: Sequence[int]) -> list[tuple[str, list[int], pa.Table]]:
        """(file name, row numbers within the file, raw rows) for ascending global row numbers."""
        starts, found = self.starts, []
        by_file: dict[int, list[int]] = {}
        for row in rows:
            index = bisect_right(starts, row) - 1
            by_file.setdefault(index, []).append(row - starts[index])
        for index, numbers in by_file.items():
            found.append((self.files[index].name, numbers, self.files[index].table(numbers)))
        return found


def open_sources(key: str, value: Any) -> Sources:
    """Open what ``key`` (data.train or data.validation) names. Raises SettingsWrong naming the file and the remedy."""
    names = list(value) if isinstance(value, list | tuple) else [value]
    files: list[Source] = []
    remarks: list[str] = []
    for name in names:
        files += _expand(key, str(name), remarks)
    for file in files:
        if lossy := structs_of_tools(file.rows.features.arrow_schema):
            remarks.append(
                f"{key}: {file.name} has {', '.join(lossy)} as structs, in which null and absent are the same: nulls are "
                "left out; a column of JSON text keeps them"
            )
    return Sources(tuple(files), tuple(remarks))


def _expand(key: str, name: str, remarks: list[str]) -> list[Source]:
    """The files that ``name`` means; what is left out of them is added to ``remarks``."""
    if is_remote(name):
        return _remote(key, name, remarks)
    path = Path(name.removeprefix("file://")).expanduser()
    if path.is_file():
        return [_file(key, path)]
    if path.anchor and path == Path(path.anchor):
        raise SettingsWrong(
            [f"{key}={name}: is the whole disk (an unset variable of the shell?): name a directory below it"]
        )
    if path.is_dir():
        there = [PurePosixPath(p.relative_to(path).as_posix()) for p in sorted(path.rglob("*")) if p.is_file()]
        found = _scanned(key, name, there, remarks)
        return [_file(key, p) for p in _inside(key, path, [path / p for p in found])]
    if any(c in name for c in "*?["):
        matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not matches:
            raise SettingsWrong([f"{key}={name}: the pattern matches no file"])
        fixed = [part for part in itertools.takewhile(lambda part: not any(c in part for c in "*?["), path.parts)]
        top = Path(*fixed)
        if "**" in path.parts:  # as far as a directory, and as blindly
            there, beside = (
                [PurePosixPath(p.relative_to(top).as_posix()) for p in paths]
                for paths in (matches, [p for mark in MARKS for p in top.rglob(mark)])
            )
            matches = [top / p for p in _scanned(key, name, there, remarks, beside)]
        return [_file(key, p) for p in _inside(key, top, matches)]
    if _format(path) or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise SettingsWrong([f"{key}={name}: no such file; give a file, a glob, a directory, a URI or a hub id"])
    return [_hub(key, name)]


def _scanned(
    key: str, place: str, files: Sequence[PurePosixPath], remarks: list[str], beside: Sequence[PurePosixPath] = ()
) -> tuple[PurePosixPath, ...]:
    """The data among the files below ``place``; raises SettingsWrong where there is none, with what there is instead."""
    found = scan(files, lambda file: bool(_format(file)), KNOWN, beside)
    if not found.wanted:
        there = f" ({'; '.join(found.skipped)})" if found.skipped else ""
        raise SettingsWrong([f"{key}={place}: the directory holds no file of {KNOWN}{there}"])
    remarks += [f"{key}={place}: {line}" for line in found.skipped]
    return found.wanted


def _inside(key: str, directory: Path, files: Sequence[Path]) -> Sequence[Path]:
    """The files themselves; raises SettingsWrong for links that lead out of the directory, whose maker may be another."""
    root = directory.resolve()
    outside = [str(p) for p in files if not p.resolve().is_relative_to(root)]
    if outside:
        raise SettingsWrong([f"{key}={directory}: {outside[0]} leads out of the directory: name the file itself"])
    return files


def _remote(key: str, uri: str, remarks: list[str]) -> list[Source]:
    """Files of an object store; a pattern may stand in the name of the file, as in s3://bucket/data/*.jsonl."""
    place, pattern = uri, "*"
    address, mark, options = uri.partition("?")
    if any(c in address for c in "*["):
        place, _, pattern = address.rpartition("/")
        place += mark + options
    try:
        files = list_files(place)
        files = [f for f in files if fnmatch.fnmatchcase(f.path.rpartition("/")[2], pattern)]
        if not files:
            raise SettingsWrong([f"{key}={redacted(uri)}: there is no such file"])
        top = os.path.commonpath([os.path.dirname(file.path) for file in files])
        by_place = {PurePosixPath(os.path.relpath(file.path, top)): file for file in files}
        wanted = _scanned(key, redacted(uri), list(by_place), remarks)
        return [_file(key, by_place[place].fetched(), by_place[place]) for place in wanted]
    except Unreachable as error:
        raise SettingsWrong([f"{key}: {error}"]) from error


def _format(path: PurePath) -> str | None:
    suffix, compression = suffixes(path)
    kind = FORMATS.get(suffix)
    return kind if kind in _TEXT_ROWS or not compression else None


def _file(key: str, path: Path, remote: RemoteFile | None = None) -> Source:
    """``remote``: what ``path`` is a copy of."""
    kind, name = _format(path), remote.uri if remote else str(path)
    if kind is None:
        raise SettingsWrong([f"{key}={name}: unknown format; known: {KNOWN}"])
    fingerprint = remote.version if remote else of_file(path)
    given = {"path": str(path), "content": fingerprint, "version": READER}
    try:
        if path.stat().st_size == 0 or _has_no_row(kind, given):
            rows = datasets.Dataset.from_dict({TEXT: []})
        elif kind in ("parquet", "arrow"):
            # `datasets` keeps what it has read under the file's name and time; the content is added to the key.
            content = of_file(path)
            rows = datasets.load_dataset(kind, f"content-{content}", data_files=str(path), split="train")
        else:
            rows = datasets.Dataset.from_generator(
                _TEXT_ROWS[kind], gen_kwargs=given,
                features=datasets.Features({TEXT: datasets.Value("large_string")}),
            )  # fmt: skip
    except (OSError, ValueError, pa.ArrowException, csv.Error, *BROKEN, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise SettingsWrong([f"{key}={name}: cannot be read as {kind}: {reason}"]) from error
    if remote is None and of_file(path) != fingerprint:
        raise SettingsWrong([f"{key}={name}: was changed while it was read: start again"])
    status = path.stat()
    return Source(name, rows, fingerprint, remote.about if remote else seen_of_file(status.st_size, status.st_mtime))


def _has_no_row(kind: str, given: dict[str, Any]) -> bool:
    """Whether a file is one of rows and has none, which `datasets` takes for an error."""
    if kind == "parquet":
        return pq.read_metadata(given["path"]).num_rows == 0
    return kind in _TEXT_ROWS and next(iter(_TEXT_ROWS[kind](**given)), None) is None


def _hub(key: str, name: str) -> Source:
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub client raises many unrelated types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SettingsWrong(
            [f"{key}={name}: no such file, and not a data set that can be read from the hub: {reason}"]
        ) from error
    return Source(name, rows, f"hub:{name}:{rows._fingerprint}")


# Bytes are carried as latin-1 text, which keeps every byte, so that broken UTF-8 is seen by `decode` and not lost here.
def _jsonl_rows(path: str, content: str, version: int) -> Iterator[dict[str, str]]:
    with opened(path) as file:
        while line := file.readline(LONGEST_LINE):
            length = len(line)
            if length == LONGEST_LINE and not line.endswith(b"\n"):
                while more := file.readline(LONGEST_LINE):
                    length += len(more)
                    if more.endswith(b"\n"):
                        break
                line = json.dumps({TOO_LONG: length, "begins": line[:1000].decode("latin-1")}).encode()
            if line.strip():
                yield {TEXT: line.rstrip(b"\r\n").decode("latin-1")}


def _json_rows(path: str, content: str, version: int) -> Iterator[dict[str, str]]:
    with opened(path) as file:
        start = file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start != b"[":  # one object per line under the other name
        yield from _jsonl_rows(path, content, version)
        return
    with opened(path) as file:
        rows = json.loads(file.read().removeprefix(b"\xef\xbb\xbf"))
    for row in rows:
        yield {TEXT: json.dumps(row)}


def _csv_rows(path: str, content: str, version: int, delimiter: str = ",") -> Iterator[dict[str, str]]:
    csv.field_size_limit(1 << 30)
    with opened(path) as file:
        # Bytes that are not UTF-8 become lone surrogates, which the quarantine names.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        for row in csv.DictReader(text, restkey=TOO_MANY_FIELDS, delimiter=delimiter):
            yield {TEXT: json.dumps({name: value for name, value in row.items() if name is not None})}


def _tsv_rows(path: str, content: str, version: int) -> Iterator[dict[str, str]]:
    yield from _csv_rows(path, content, version, delimiter="\t")


_TEXT_ROWS = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows, "tsv": _tsv_rows}

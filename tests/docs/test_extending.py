"""docs/extending.md does what it says: its edits are made in a copy of the code, and what it runs is run there."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
PARTS = ("alphatoken", "conf", "data_schemas", "jobs", "pipeline")


@dataclass(frozen=True)
class Block:
    """A fenced block of the page."""

    language: str
    text: str


def blocks(section: str) -> list[Block]:
    """The blocks of the section with this heading, in order."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    own = next(text for text in sections if text.startswith(f"{section}\n"))
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", own, flags=re.MULTILINE | re.DOTALL)]


def apply(diff: str, place: Path) -> None:
    """Make the edits of a diff without line numbers; every hunk's old lines must stand in its file exactly once."""
    for part in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
        (name, second), *hunks = (hunk.splitlines() for hunk in re.split(r"^@@\n", part, flags=re.MULTILINE))
        assert second == f"+++ b/{name}"
        text = (place / name).read_text(encoding="utf-8")
        for hunk in hunks:
            assert all(line[0] in " +-" for line in hunk), hunk
            old, new = ("".join(f"{line[1:]}\n" for line in hunk if line[0] in kept) for kept in (" -", " +"))
            assert text.count(old) == 1, f"{name} has these lines {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        (place / name).write_text(text, encoding="utf-8")


class Copy:
    """A copy of the code with the edits of a section, and the tiny model and data of the tests at the page's paths."""

    def __init__(self, place: Path, section: str, paths: dict[str, Path]) -> None:
        self.place, self.paths, self.checks, self.commands = place, paths, [], []
        for part in PARTS:
            shutil.copytree(ROOT / part, place / part, ignore=shutil.ignore_patterns("__pycache__"))
        for block in blocks(section):
            if block.language == "diff":
                apply(block.text, place)
            elif block.language == "bash":
                self.commands.append(block.text)
            elif new := re.match(r"# (\S+\.py)\n+", block.text):
                (place / new[1]).write_text(block.text.removeprefix(new[0]), encoding="utf-8")
            else:
                self.checks.append(block.text)

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """A command in the copy, with its code first on the path."""
        environment = os.environ | {"PYTHONPATH": str(self.place)}
        return subprocess.run(command, cwd=self.place, env=environment, capture_output=True, text=True)

    def here(self, text: str) -> str:
        """``text`` with the page's paths replaced."""
        for name, path in self.paths.items():
            assert name in text
            text = text.replace(name, str(path))
        return text


def test_a_score_is_one_file_and_a_line_in_each_table(tmp_path, policy, train_file):
    copy = Copy(tmp_path / "code", "Adding a score", {"/models/my-sft-start": policy})
    (check,), (command,) = copy.checks, copy.commands
    found = copy.run(sys.executable, "-c", copy.here(check))
    assert found.returncode == 0, found.stderr

    copy.paths |= {"/data/train.jsonl": train_file, "runs/surprise": tmp_path / "run"}
    name, *words = copy.here(command.replace("\\\n", "")).replace("'", "").split()
    assert name == "alphatoken"
    more = ["cluster.workers=1", "cluster.cpus_per_worker=1", "data.validation=4"]
    found = copy.run(sys.executable, "-m", "alphatoken.jobs", *words, *more)
    assert found.returncode == 0, found.stderr
    values = pq.read_table(tmp_path / "run" / "values")
    assert values.column_names == ["id", "loss", "surprise"]
    mask = tmp_path / "run" / "masks" / "default"
    summary = json.loads((mask / "summary.json").read_text())
    assert summary["score"] == "surprise"
    surprise = summary["columns"]["surprise"]
    assert surprise["mean_kept"] < surprise["mean_masked"] and surprise["negative_fraction"] > 0
    assert "is the token less likely than the model expected it to be?" in (mask / "README.md").read_text()


def test_an_input_shape_is_one_function_and_its_name(tmp_path, policy):
    copy = Copy(tmp_path / "code", "Adding an input shape", {"/models/my-sft-start": policy})
    (check,) = copy.checks
    found = copy.run(sys.executable, "-c", copy.here(check))
    assert found.returncode == 0, found.stderr


def test_an_edit_that_no_longer_fits_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("one\ntwo\ntwo\n")
    with pytest.raises(AssertionError, match="2 times"):
        apply("--- a/a.py\n+++ b/a.py\n@@\n two\n+three\n", tmp_path)
    apply("--- a/a.py\n+++ b/a.py\n@@\n one\n-two\n+three\n", tmp_path)
    assert (tmp_path / "a.py").read_text() == "one\nthree\ntwo\n"

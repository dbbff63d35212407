"""README.md does what it says: its commands and its Python are run, in order, with a tiny model and tiny data."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import SMALL
from tests.docs.pages import ROOT, blocks, commands, sections

PAGE = ROOT / "README.md"
TEXT = PAGE.read_text(encoding="utf-8")
OWN = {
    "run": [*SMALL, "cluster.workers=1"],
    "trial": ["trial.seeds=2", "trial.steps=2", "trial.examples=6"],
    "mask": [],
}


def test_it_is_read_in_five_minutes():
    assert len(PAGE.read_bytes()) <= 8 * 1024


@pytest.fixture(scope="module")
def places(tmp_path_factory, policy, train_file, validation_file) -> dict[str, Path]:
    """What the README's paths are here; the demo's run is the one that the commands make."""
    run = tmp_path_factory.mktemp("readme") / "mine"
    return {
        "/models/my-sft-start": policy,
        "/data/train.jsonl": train_file,
        "/data/target-task.jsonl": validation_file,
        "runs/mine": run,
        "runs/demo": run,
    }


def here(text: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        text = text.replace(name, str(path))
    return text


@pytest.fixture(scope="module")
def done(places, ray_cluster) -> Path:
    """Where the README's commands were run, in order."""
    from alphatoken.jobs.cli import main

    typed = [words for words in commands(TEXT) if words[0] == "alphatoken"]
    assert [words[1] for words in typed] == ["run", "trial", "mask"]
    for _, name, *words in typed:
        assert main([name, *(here(word, places) for word in words), *OWN[name]]) == 0
    return places["runs/mine"]


def test_its_commands_run_one_after_the_other(done):
    assert "trial.masks=default,noise" in TEXT
    tried = set(pq.read_table(done / "trial/results.parquet")["candidate"].to_pylist())
    assert {"full", "default", "noise"} <= tried
    swept = [path.name for path in (done / "masks").iterdir() if "rho-" in path.name]
    assert len(swept) == 9
    assert (done / "report/index.html").is_file()  # `run` writes it; README names the command that does it again


def test_its_python_runs(done, places):
    load, value = (block.text for block in blocks(TEXT) if block.language == "python")
    found: dict = {}
    exec(compile(here(load, places), "README.md", "exec"), found)
    rows = found["rows"]
    assert rows.column_names == ["input_ids", "attention_mask", "labels"] and len(rows) > 0
    for row in rows:
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    exec(compile(here(value, places), "README.md", "exec"), found)
    length = found["input_ids"].shape[1]
    assert {name: tuple(v.shape) for name, v in found["values"].items()} == {
        "loss": (1, length),
        "entropy": (1, length),
    }
    assert found["values"]["loss"][0, 1:].min() > 0


def test_its_report_command_writes_the_page_that_it_names(done, places, alphatoken):
    (command,) = re.findall(r"`alphatoken (report [^`]+)`", TEXT)
    page = done / "report/index.html"
    page.unlink(missing_ok=True)
    status, _, err = alphatoken(*here(command, places).split())
    assert status == 0 and page.is_file(), err


EVIDENCE = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
CLEAN, NOISY = "\n## Half of the tokens of clean code\n", "\nFine-tunes on noisy rows "
# Row of README's table -> the tables of docs/evidence.md and the beginnings of their rows that its numbers are of, in order.
ROWS = {
    "nothing (the model untouched)": [(CLEAN, "model untouched")],
    "every response token": [(CLEAN, "every response token |")],
    "every response token but the first": [(CLEAN, "every response token but the first of each")],
    "half of them: the default mask (a random half)": [(CLEAN, "**the default**"), (CLEAN, "random half (")],
    "20 % of them garbled: everything (`mask=noise`, which keeps 70 %)": [
        (NOISY, "every response token |"),
        (NOISY, "**the default minus the loss** (`mask.score=information mask.loss_weight=1"),
    ],
}
PAPER = "`mask.score=paper`, at the untouched model, lambda 0 |"


def table(text: str, after: str) -> list[list[str]]:
    """The cells of the first table after some words, the head first."""
    lines = re.search(r"(?:^\|.*\n)+", text.split(after)[1], re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def cell_of(after: str, row: str, column: str) -> str:
    """Of the one row of a table of docs/evidence.md that begins so."""
    head, *rows = table(EVIDENCE, after)
    (found,) = (cells for cells in rows if f"{cells[0]} |".startswith(row))
    return found[head.index(column)]


def same(told: str, cell: str) -> bool:
    """Whether a number is that of a cell, which has a digit more: 0.8995 may be either of its neighbours."""
    return abs(float(told) - float(cell.strip("*").split(" ")[0])) <= 0.00051


def test_its_numbers_are_those_of_the_rows_that_they_speak_of():
    _, *rows = table(TEXT, "\n## Evidence in five lines\n")
    assert [cells[0] for cells in rows] == list(ROWS)
    for name, *cells in rows:
        for column, told in zip(("code", "general"), cells, strict=True):
            numbers, wanted = re.findall(r"\d\.\d+", told), [cell_of(*where, column) for where in ROWS[name]]
            assert len(numbers) == len(wanted), name
            assert all(same(*pair) for pair in zip(numbers, wanted, strict=True)), (name, numbers, wanted)
    stale = re.search(r"at the untouched model, it ends at (\S+) and (\S+)\. ", TEXT).groups()
    assert all(
        same(told, cell_of(CLEAN, PAPER, column)) for told, column in zip(stale, ("code", "general"), strict=True)
    )
    worse, section = re.search(r"\[(\d\.\d+ nats) worse\]\(docs/results\.md#([\w-]+)\)", TEXT).groups()
    assert worse in sections((ROOT / "docs/results.md").read_text(encoding="utf-8"))[section]
    assert "Means of three\nseeds (of everything two, the garbled ones one)" in TEXT
    seeds = [cell_of(after, row, "seeds") for where in ROWS.values() for after, row in where if after == CLEAN]
    assert seeds == ["1", "2", "3", "3", "3"]  # an untouched model has no seed


def test_its_numbers_of_models_are_those_of_the_page():
    models = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    types, right = re.search(r"^(\d+) types: (\d+) right,", models, re.MULTILINE).groups()
    refused = re.search(r"(\d+) refused", models).group(1)
    assert f"{right} of {types} model types" in TEXT and f"{refused} are refused" in TEXT

"""README.md does what it says: its commands and its Python are run, in order, with a tiny model and tiny data."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import SMALL
from tests.docs.pages import ROOT, blocks, commands

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


def test_its_numbers_are_those_of_the_pages():
    evidence = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    exact = [float(number) for number in re.findall(r"\b\d\.\d{4}\b", evidence)]
    own = re.findall(r"\b\d\.\d{3}\b", TEXT)
    assert len(own) > 10
    # 0.8995 may be either of its neighbours
    assert not [number for number in own if not any(abs(float(number) - e) <= 0.00051 for e in exact)]
    types, right = re.search(
        r"^(\d+) types: (\d+) right,", (ROOT / "docs/models.md").read_text(), re.MULTILINE
    ).groups()
    refused = re.search(r"(\d+) refused", (ROOT / "docs/models.md").read_text()).group(1)
    assert f"{right} of {types} model types" in TEXT and f"{refused} are refused" in TEXT

"""examples/ run as they stand: the training script on a mask that fits and on one that does not, the notebook in a kernel."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pyarrow.parquet as pq
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM

from tests.conftest import save_tokenizer
from tests.mask.synthetic_run import ROOT, mask, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("example")
    save_tokenizer(place / "tokenizer")
    storage, *_ = write_run(place / "run", (30, 25), tokenizer=str(place / "tokenizer"))
    mask(storage)
    return place / "run"


def train(run: Path, policy: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "examples/train.py", run, "--model", policy, "--out", out, "--steps", "20", "--cpu"]
    environment = {**os.environ, "HF_HOME": str(out.parent / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [*map(str, command), "--learning-rate", "2e-3"], cwd=ROOT, capture_output=True, text=True, env=environment
    )


def test_the_training_script_checks_a_batch_and_learns(run, policy, tmp_path):
    done = train(run, policy, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agrees: the batch trains on what the mask keeps" in done.stdout
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"steps"')))
    assert told["steps"] == 20 and told["last_loss"] < told["first_loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_training_script_stops_where_its_data_are_not_the_masks(run, policy, tmp_path):
    """The mask is spoiled after it was made, as by a copy of another version: the card's rows are not the run's."""
    other = tmp_path / "run"
    shutil.copytree(run, other)
    for shard in (other / "masks/default/data").iterdir():
        table = pq.read_table(shard)
        (other / "elsewhere").mkdir(exist_ok=True)
        everything = table.set_column(2, table.schema.field("labels"), table["input_ids"])
        pq.write_table(everything, other / "elsewhere" / shard.name)
    card = other / "masks/default/README.md"
    card.write_text(card.read_text().replace("path: data/", "path: ../../elsewhere/"))
    done = train(other, policy, tmp_path / "out")
    assert done.returncode == 1 and "trained on that the mask leaves out" in done.stdout, (
        done.stdout + done.stderr[-2000:]
    )
    assert "agrees: no" in done.stdout and '"steps"' not in done.stdout


def test_the_notebook_runs_from_the_first_cell_to_the_last(run, monkeypatch):
    monkeypatch.setenv("RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    notebook = nbformat.read(ROOT / "examples/look_at_a_mask.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none is committed
    NotebookClient(notebook, timeout=120, km=AsyncKernelManager(transport="ipc")).execute()
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", []) if one.get("name") != "stderr"]
    shown = [one["text"] if one["output_type"] == "stream" else one["data"]["text/plain"] for one in outputs]
    summary = json.loads((run / "masks/default/summary.json").read_text())
    assert (
        f"55 rows, {summary['kept_fraction']:.1%} of {summary['response_tokens']:,} response tokens are kept"
        in shown[0]
    )
    means = {name: column["mean_kept"] for name, column in summary["columns"].items() if name != "value"}
    found = {line.split()[0]: float(line.split()[-1]) for line in shown[1].splitlines() if line.split()[0] in means}
    assert found == pytest.approx(means, abs=1e-4)
    assert re.search(r"\[.+\]", shown[-1])  # something is left out of the longest response

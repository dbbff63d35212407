"""docs/trainers.md: its commands and the blocks of the trainers that are installed run; every format is in its table."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alphatoken.jobs.cli import main
from alphatoken.pipeline.trainers.formats import FORMATS
from tests.mask.synthetic_run import ROOT, mask, write_run

PAGE = (ROOT / "docs/trainers.md").read_text(encoding="utf-8")


def blocks(heading: str, language: str) -> list[str]:
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory to stand in, with RUN in it."""
    place = tmp_path_factory.mktemp("page")
    storage, *_ = write_run(place / "RUN", (14, 12))
    mask(storage)
    (place / "lines").mkdir()
    return place


def run(code: str, place: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(place / "cache"), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment |= {"ACCELERATE_USE_CPU": "true", "WANDB_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_export_of_the_page_is_made_and_every_format_is_there(place, monkeypatch):
    monkeypatch.chdir(place)
    (commands,) = blocks("Export", "bash")
    for line in commands.splitlines():
        assert line.startswith("alphatoken export ") and main(line.split()[1:]) == 0
        assert Path(line.split()[-1]).exists()
    assert {line.split()[6] for line in commands.splitlines()} == set(FORMATS)
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == set(FORMATS)


def test_a_masks_card_says_of_every_trainer_what_the_page_says(place):
    """The version that was tried and how, and of those that do not read the directory the format and the section."""
    card = (place / "RUN/masks/default/README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| \[([\w-]+)\]\(#([\w-]+)\)[^|]*\| ([\d.]+) \| (run|read)\b[^|]*\|[^|]*\| ([^|]+) \|$", PAGE, re.MULTILINE
    )
    assert len(rows) == 12
    for trainer, section, version, tried, reads in rows:
        if reads == "the directory":
            named = re.search(rf"\b{trainer} ([\d.]+) \({tried}\)", card)
            assert named and f"{version}.".startswith(f"{named[1]}."), trainer
        else:
            to = reads.strip("`").removeprefix("export --to ")
            assert f"| {trainer} {version} | {tried} | `{to}` | docs/trainers.md#{section} |" in card
    assert card.count("docs/trainers.md#") == sum(reads != "the directory" for *_, reads in rows)


@pytest.mark.parametrize("trainer", ["TRL", "transformers"])
def test_the_blocks_of_installed_trainers_train_on_the_mask(place, policy, trainer):
    (block,) = blocks(trainer, "python")
    save, check = blocks("Does it do what I think", "python")
    assert "\ntrainer.train()\n" in block
    code = block.replace("path/to/model", str(policy)).replace(
        "max_length=None", "max_length=None, use_cpu=True, bf16=False"
    )
    code = code.replace("trainer.train()\n", f"{save}\n{check}\ntrainer.train()\n")
    run(code, place)
    (command,) = blocks("Does it do what I think", "bash")
    run(f"import sys; from alphatoken.jobs.cli import main; sys.exit(main({command.split()[1:]!r}))", place)


def test_all_python_of_the_page_can_be_read_and_names_what_is_there():
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("alphatoken"):
                module = __import__(node.module, fromlist=["_"])
                assert all(hasattr(module, alias.name) for alias in node.names)

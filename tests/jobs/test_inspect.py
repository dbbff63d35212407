"""alphatoken inspect: rows in the terminal, as they are printed."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from alphatoken.jobs.cli import main
from tests.mask.synthetic_run import masks
from tests.report.shown_run import EOS, HOSTILE, PLAIN, with_masks, write_shown

ROOT = Path(__file__).parents[2]
WORDS = [*PLAIN[:-2], "longer"]  # no line breaks, so that a response is one line


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    made = write_shown(tmp_path_factory.mktemp("inspect"), words=WORDS)
    return with_masks(made, default={"min_kept": 1}, paper={"score": "paper"}, third={"rho": 0.3})


@pytest.fixture
def inspect(capfd):
    """Returns (exit status, lines of stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, list[str], str]:
        capfd.readouterr()
        status = main(["inspect", *map(str, arguments)])
        out = capfd.readouterr()
        return status, out.out.splitlines(), out.err

    return run


def command(storage, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs", "inspect", storage.root, *arguments]


def on_a_terminal(storage, *arguments: str, **environment: str) -> str:
    """What the command writes to a terminal of 80 columns."""
    ours, its = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    process = subprocess.Popen(command(storage, *arguments), cwd=ROOT, stdout=its, stderr=subprocess.DEVNULL, env=env)
    os.close(its)
    found = b""
    while True:
        try:
            block = os.read(ours, 1 << 16)
        except OSError:  # the terminal has no other end any more
            break
        if not block:
            break
        found += block
    os.close(ours)
    assert process.wait(60) == 0
    return found.decode()


def without_brackets(line: str) -> tuple[str, str]:
    """(the whole response, what of it is kept)."""
    return line.replace("⟦", "").replace("⟧", ""), re.sub("⟦.*?⟧", "", line)


def response(row: dict, labels: list[int]) -> str:
    names = ["<unk>", "<eos>", *WORDS]
    return "".join(names[token] for token, label in zip(row["input_ids"], labels, strict=True) if label != -100)


def test_a_row_is_shown_with_every_mask_under_each_other(storage, inspect):
    status, lines, _ = inspect(storage.root, "--row", "row-20")
    assert status == 0 and lines[0] == "row-20  row 20, data/file.jsonl:20"
    prepared = pq.read_table(storage.path("prepared/part-00001-of-00002.parquet")).to_pylist()[4]
    for name in ("default", "paper", "third"):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name}  "))
        labels = masks(storage, name)[20]["labels"]
        kept = sum(label != -100 for label in labels)
        assert lines[at] == f"{name}  {kept} of 21 kept ({kept / 21:.1%})"
        assert without_brackets(lines[at + 1]) == (response(prepared, prepared["labels"]), response(prepared, labels))


def test_a_row_is_found_by_the_number_that_it_is_shown_with(storage, inspect):
    status, lines, _ = inspect(storage.root, "--row", "20", "--row", "row-3", "--row", "0")
    assert status == 0 and [line.partition("  ")[0] for line in lines if "data/file.jsonl" in line] == [
        "row-0",
        "row-3",
        "row-20",
    ]
    assert sum("data/file.jsonl" in line for line in inspect(storage.root, "--row", "3", "--row", "row-3")[1]) == 1
    status, _, err = inspect(storage.root, "--row", "1000000")
    assert status == 1 and "no row has the id 1000000" in err


def test_the_top_rows_by_a_column_are_those_with_the_highest_mean(storage, inspect):
    means = {}
    for part in storage.names("prepared"):
        values = pq.read_table(storage.path(part.replace("prepared", "values"))).to_pylist()
        for left, right in zip(pq.read_table(storage.path(part)).to_pylist(), values, strict=True):
            inside = np.array(left["labels"]) != -100
            means[left["id"]] = np.array(right["information"])[inside].mean()
    _, lines, err = inspect(storage.root, "--top", 4, "--by", "information", "--mask", "default")
    shown = [line.split("  ")[0] for line in lines if line.startswith("row-")]
    assert shown == sorted(means, key=means.get, reverse=True)[:4] and "4 of 30 rows, by information" in err


def test_rows_that_keep_only_always_kept_tokens_come_first(storage, inspect):
    only = {
        f"row-{i}" for i, row in enumerate(masks(storage))
        if {t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100} == {EOS}
    }  # fmt: skip
    _, lines, _ = inspect(storage.root, "--top", len(only))
    assert {line.split("  ")[0] for line in lines if line.startswith("row-")} == only != set()


def test_changed_shows_the_rows_in_which_most_tokens_are_decided_differently(storage, inspect):
    both = zip(masks(storage, "default"), masks(storage, "third"), strict=True)
    differ = [sum(a != b for a, b in zip(one["labels"], other["labels"], strict=True)) for one, other in both]
    _, lines, err = inspect(storage.root, "--changed", "default,third", "--top", 3)
    shown = [int(line.split("  ")[0].removeprefix("row-")) for line in lines if line.startswith("row-")]
    assert [differ[i] for i in shown] == sorted(differ, reverse=True)[:3]
    assert f"3 of the {sum(n > 0 for n in differ)} rows that default and third decide differently, of 30" in err
    assert not any(line.startswith("paper") for line in lines)


def test_values_are_one_line_per_token_and_fit_80_columns(storage, inspect):
    _, lines, _ = inspect(storage.root, "--row", "row-7", "--mask", "default", "--values")
    assert max(map(len, lines[3:])) <= 80
    values = pq.read_table(storage.path("values/part-00000-of-00002.parquet")).to_pylist()[7]
    first = [f"{values[name][3]:.3g}" for name in values if name != "id"]
    found = [line.split() for line in lines if line.split()[1:2] in (["kept"], ["dropped"])]
    assert [number for line in found[::8] for number in line[2:]] == first  # the first token of eight, in each table


def test_a_terminal_gets_colours_and_a_pipe_none(storage):
    coloured = on_a_terminal(storage, "--row", "row-20")
    assert "\x1b[" in coloured and "48;5;" in coloured and "⟦" in coloured and "colour: information" in coloured
    assert "\x1b[" in (bold := on_a_terminal(storage, "--row", "row-20", NO_COLOR="1")) and "48;5;" not in bold
    widest = max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in coloured.splitlines())
    assert widest <= 80
    piped = subprocess.run(command(storage, "--row", "row-20"), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert piped.returncode == 0 and "\x1b" not in piped.stdout and "⟦" in piped.stdout and "colour" not in piped.stdout


def test_text_cannot_steer_the_terminal(tmp_path, inspect):
    made = write_shown(tmp_path, words=[*HOSTILE, "[bold]"], ids="\x1b]0;title\x07{}", source="\x1b[2J")
    with_masks(made, default={})
    status, lines, _ = inspect(made.root, "--top", 30)
    text = "\n".join(lines)
    assert status == 0 and "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert "␛]0;title␇" in text and "␛[2J" in text and "␛[31m" in text and "[bold]" in text


def test_pairs_show_both_branches(tmp_path, inspect):
    made = with_masks(write_shown(tmp_path, words=WORDS, pairs=True), default={})
    _, lines, _ = inspect(made.root, "--row", "row-9")
    assert [line.split("  ")[0] for line in lines if " kept (" in line] == ["chosen, default", "rejected, default"]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (
            ["--row", "nobody"],
            1,
            "no row has the id nobody; ids here are like row-0, row-1, row-2, numbers of rows 0 to ",
        ),
        (["--by", "beauty"], 2, "choices: affected, dropped, kept, adaptation_direct"),
        (["--colour", "beauty"], 2, "choices: adaptation_direct"),
        (["--mask", "default,other"], 2, "no mask other; it has default, paper, third"),
        (["--changed", "default"], 2, "give two different masks"),
        (["--top", "0"], 2, "give a whole number above 0"),
        (["--tpo", "3"], 2, "unrecognized arguments: --tpo 3; did you mean --top?; options: --row, --top, "),
        (["mask.rho=0.3"], 2, "mask.rho=0.3"),
    ],
)
def test_what_is_wrong_is_said_with_the_choices(storage, inspect, arguments, status, says):
    found, lines, err = inspect(storage.root, *arguments)
    assert (found, lines) == (status, []) and says in err and len(err.splitlines()) == 1


def test_a_directory_that_is_no_run_is_said(inspect, tmp_path):
    status, _, err = inspect(tmp_path / "none")
    assert status == 1 and f"{tmp_path}/none: there is no such directory: give the directory of a run" in err
    status, _, err = inspect(tmp_path)
    assert status == 1 and "holds no run" in err


def test_help_lists_its_options_alone(capsys):
    assert main(["inspect", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--changed A,B" in text and "usage: alphatoken inspect RUN" in text

"""docs/masks.md: every block is run on a run directory, and the answers to its questions are counted anew."""

import re
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest

from alphatoken.jobs.cli import main
from tests.mask.synthetic_run import ROOT, mask, masks, write_run

PAGE = (ROOT / "docs/masks.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
(SWEEP,) = re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory to stand in, with RUN and sweep.csv in it, and the rows."""
    place = tmp_path_factory.mktemp("page")
    storage, prepared, values = write_run(place / "RUN", (150, 0, 90))
    mask(storage)
    words = SWEEP.replace("RUN", str(place / "RUN")).replace("sweep.csv", str(place / "sweep.csv")).split()
    assert words[0] == "alphatoken" and main(words[1:]) == 0
    return place, prepared, values, masks(storage)


def test_every_block_runs_as_it_stands(run):
    place, *_ = run
    assert len(PYTHON) == 5
    for block in PYTHON:
        done = subprocess.run([sys.executable, "-c", block], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_all_readers_give_the_same_rows(run):
    import polars as pl

    place, _, _, rows = run
    folder = place / "RUN/masks/default/data"
    for found in (pd.read_parquet(folder), pl.read_parquet(folder / "*.parquet")):
        assert [list(one) for one in found["labels"]] == [row["labels"] for row in rows]


def test_duckdbs_answer_is_the_plain_mean(run):
    import duckdb

    place, prepared, values, _ = run
    (block,) = (one for one in PYTHON if "duckdb" in one)
    query = block.split('"""')[1].replace("RUN", str(place / "RUN"))
    answer = {token: (times, mean) for token, times, mean in duckdb.sql(query).fetchall()}
    by_token = defaultdict(list)
    for row, own in zip(prepared, values, strict=True):
        for label, value in zip(row["labels"], own["information"], strict=True):
            if label != -100:
                by_token[label].append(value)
    means = {token: (len(v), np.mean(v)) for token, v in by_token.items() if len(v) >= 5}
    assert (
        len(answer) == 20
        and min(mean for _, mean in answer.values()) >= sorted(m for _, m in means.values())[-20] - 1e-9
    )
    for token, (times, mean) in answer.items():
        assert times == means[token][0] and mean == pytest.approx(means[token][1], rel=1e-6)


def test_each_of_the_questions_is_asked_of_the_values():
    _, section = PAGE.split("## Three questions to the values\n")
    asked = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    libraries = [re.search(r"^import (duckdb|polars|pandas)\b", block, re.MULTILINE) for block in asked]
    assert [found and found[1] for found in libraries] == ["duckdb", "polars", "pandas"]
    assert all("RUN/values/part-*.parquet" in block for block in asked)


def answer_of(place, marked: str, made: str):
    """What the block of the page prints, as Python's own objects; ``made``: a method of the table that gives them."""
    (block,) = (one for one in PYTHON if marked in one)
    code = re.sub(r"^print\((.*)\)\n\Z", rf"print((\1).{made})", block, flags=re.MULTILINE)
    assert code != block
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)  # what this test has printed


def test_polars_answer_is_the_plain_mean_and_share(run):
    place, prepared, values, rows = run
    found = {
        row["position"]: (row["information"], row["kept"], row["tokens"])
        for row in answer_of(place, "import polars as pl\n\nprepared", "to_dicts()")
    }
    wanted = defaultdict(list)
    for row, value, kept in zip(prepared, values, rows, strict=True):
        own = zip(row["labels"], value["information"], kept["labels"], strict=True)
        inside = [(information, k != -100) for label, information, k in own if label != -100]
        for position, one in enumerate(inside):
            wanted[position].append(one)
    assert found == {p: (*map(pytest.approx, np.mean(v, axis=0)), len(v)) for p, v in wanted.items()}


def test_pandas_answer_is_the_plain_sum(run):
    place, _, values, _ = run
    found = answer_of(place, "glob", "to_dict('records')")
    sums = {row["id"]: sum(row["information"]) for row in values}
    assert [row["information"] for row in found] == pytest.approx(sorted(sums.values(), reverse=True)[:20], rel=1e-5)
    assert all(row["information"] == pytest.approx(sums[row["id"]], rel=1e-5) for row in found)


def test_the_table_of_the_sweep_is_complete(run):
    place, *_ = run
    table = pd.read_csv(place / "sweep.csv")
    assert len(table) == 10 and table["baseline"].sum() == 1  # nine masks, and the default one they are compared with
    made = table[~table["baseline"]]
    assert sorted(set(made["mask.rho"])) == [0.3, 0.5, 0.7]
    assert set(made["mask.score"]) == {"information", "entropy", "loss"}
    assert (table["kept_tokens"] / table["response_tokens"]).tolist() == pytest.approx(table["kept_fraction"].tolist())
    assert (
        table["agreement"].between(0, 1).all() and table["loss_of_kept"].notna().all() and table["failed"].isna().all()
    )


def test_failed_points_stand_in_the_table_and_a_wrong_place_is_said_first(tmp_path, capsys):
    write_run(tmp_path / "run", columns=("loss",))
    mask_command = ["mask", "-m", f"run.dir={tmp_path}/run", "mask.score=loss,information"]
    assert main([*mask_command, "--csv", str(tmp_path / "t.csv")]) == 1
    table = pd.read_csv(tmp_path / "t.csv")
    assert table["mask"].tolist() == ["score-loss", "score-information"]
    assert "needs the column information" in table["failed"].iloc[1] and pd.isna(table["failed"].iloc[0])
    assert main([*mask_command, f"--csv={tmp_path}/none/t.csv"]) == 2
    assert "lies in none that is there" in capsys.readouterr().err
    assert main(["mask", f"run.dir={tmp_path}/run", "mask.score=loss", "--csv", "t.csv"]) == 2
    assert "give -m" in capsys.readouterr().err

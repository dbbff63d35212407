"""The tables' runs: that the pipeline takes every row's settings, and that all runs value the same rows."""

import json

import pyarrow.parquet as pq
import pytest

from alphatoken.jobs.config import load
from benchmarks.quality import ends, grid, noise
from tests.conftest import chat_row, write_rows

GRIDS = {"grid": (grid.RUNS, grid.ROWS), "noise": (noise.RUNS, noise.ROWS)}
PLACES = {"model": "/models/start", "fine_tuned": "/models/end", "place": "/data"}


def settings_of(run, mask=()):
    return load([override.format(**PLACES) for override in (*run, *mask)])


@pytest.mark.parametrize(("runs", "rows"), GRIDS.values(), ids=GRIDS)
def test_the_pipeline_takes_the_settings_of_every_row(runs, rows):
    assert len({row.slug for row in rows}) == len(rows)
    assert {row.run for row in rows} == runs.keys()  # nothing is valued for no row
    for row in rows:
        assert settings_of(runs[row.run], row.mask).mask_problems(pairs=False) == [], row.name


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("default 0.5", ("information", 0.0, 1)),
        ("default lambda=1.5 0.5", ("information", 1.5, 1)),
        ("information 0.5", ("information", 0.0, 0)),
        ("paper 0.5", ("paper", 0.0, 0)),
        ("paper lambda=1.5 0.5", ("paper", 1.5, 0)),
        ("entropy skip_first=1 0.5", ("entropy", 0.0, 1)),
        ("rehearsal 0.5", ("paper", 1.5, 0)),  # written over by what the rehearsal did
        ("random 0.3", ("random", 0.0, 0)),
    ],
)
def test_a_row_of_the_grid_is_the_mask_that_its_name_says(name, kept):
    row = next(row for row in grid.ROWS if row.name == name)
    settings = settings_of(grid.RUNS[row.run], row.mask)
    mask = settings.mask.resolved(settings.valuation.rehearsed, settings.anchor.drift)
    assert (mask.score, mask.stability_weight, mask.skip_first) == kept


def test_what_is_looked_at_is_valued():
    for _, overrides, names in ends.VALUES.values():
        assert {*names, "loss"} <= {*settings_of(overrides).valuation.columns}
    for run, scores in noise.VALUED.items():
        columns = {*settings_of(noise.RUNS[run]).valuation.columns}
        assert {"loss"}.union(*scores.values()) <= columns
        assert noise.ALIGNMENT not in scores.values() or "gradient_norm" in columns


def test_runs_without_a_fisher_leave_out_the_rows_that_others_hold_out_as_its_prompts(alphatoken, policy, tmp_path):
    files = [
        write_rows(tmp_path / f"{name}.jsonl", [{"id": f"{name}-{i}", **chat_row(i)} for i in range(20)])
        for name in "ab"
    ]
    validation = write_rows(tmp_path / "validation.jsonl", [chat_row(500)])
    status, _, err = alphatoken(
        "prepare", f"run.dir={tmp_path / 'run'}", f"model.policy={policy}", f"data.train=[{files[0]},{files[1]}]",
        f"data.validation={validation}", f"anchor.fisher.prompts={grid.FISHER}", "run.seed=3",
    )  # fmt: skip
    assert status == 0, err
    parts = sorted((tmp_path / "run" / "prepared").glob("part-*"))
    others = [name for part in parts for name in pq.read_table(part).column("id").to_pylist()]
    left = [json.loads(line)["id"] for file in grid.without_prompts(files, 3) for line in file.read_text().splitlines()]
    assert len(left) == 40 - grid.FISHER and left == others

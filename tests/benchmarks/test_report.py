"""The benchmark of the report: what it writes is a run, and a larger one takes no more memory."""

from __future__ import annotations

from alphatoken.pipeline.mask.stage import make_mask
from benchmarks.report import COLUMNS, measure, run_of, write_run


def test_its_run_can_be_masked_and_reported(tmp_path):
    storage = write_run(str(tmp_path), 300, 20)
    summary = make_mask(run_of(storage, name="default"))
    assert summary["rows"] == 300 and set(COLUMNS) <= set(summary["columns"])
    found = measure(str(tmp_path))
    assert storage.exists("report/index.html") and found["cpu"] > 0 and found["before"] <= found["peak"]

"""What a trial leaves in its run directory."""

import json
from pathlib import Path

import pyarrow.parquet as pq

from alphatoken.data_schemas import TRIAL_RESULTS


def results(run: Path) -> list[dict]:
    """One row for each fine-tune, of the schema that is promised."""
    table = pq.read_table(run / "trial/results.parquet")
    assert table.schema.equals(TRIAL_RESULTS)
    return table.to_pylist()


def summary(run: Path) -> dict:
    """The table and the sentence."""
    return json.loads((run / "trial/summary.json").read_text())

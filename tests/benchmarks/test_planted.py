"""What the benchmark of the unrolled direction reads from a run: columns beside planted tokens, and what masks keep of them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alphatoken.pipeline.maths.batch import IGNORED
from benchmarks.quality.planted import areas, kept, response_columns, scores_of

# Two rows, prompts of one token; the third response token of each is planted.
LABELS = [[IGNORED, 11, 12, 13], [IGNORED, 14, 15, 16]]
IDS = [[1, 11, 12, 13], [2, 14, 15, 16]]
PLANTED = {"a": [False, False, False, True], "b": [False, False, False, True]}
LOSS = [[0.0, 1.0, 2.0, 9.0], [0.0, 3.0, 4.0, 8.0]]
MASKED = [[IGNORED, 11, 12, IGNORED], [IGNORED, IGNORED, 15, 16]]


@pytest.fixture
def place(tmp_path):
    """A run directory with what the benchmark reads."""
    (tmp_path / "planted.json").write_text(json.dumps(PLANTED))
    run = tmp_path / "R"
    tables = {
        "prepared": {"id": ["a", "b"], "input_ids": IDS, "labels": LABELS},
        "values": {"id": ["a", "b"], "loss": LOSS, "adaptation_unrolled": [[0, 1, 1, 0], [0, 1, 1, 2]]},
        "masks/half/data": {"input_ids": IDS, "labels": MASKED},
    }
    for folder, columns in tables.items():
        (run / folder).mkdir(parents=True)
        name = "train-00000-of-00001" if "masks" in folder else "part-00000-of-00001"
        pq.write_table(pa.table(columns), run / folder / f"{name}.parquet")
    return tmp_path


def test_columns_are_those_of_the_response_tokens(place):
    found = response_columns(place, place / "R")
    assert found["loss"].tolist() == [1, 2, 9, 3, 4, 8] and found["planted"].tolist() == [0, 0, 1, 0, 0, 1]


def test_scores_are_made_of_the_columns_that_a_run_has(place):
    scores = scores_of(response_columns(place, place / "R"))
    assert set(scores) == {"own step", "minus loss", "own step and minus loss, rank sum"}
    assert np.array_equal(scores["minus loss"], [-1, -2, -9, -3, -4, -8])


def test_areas_are_of_clean_against_planted_tokens(place):
    lines = areas(place, [place / "R"]).splitlines()
    assert "| R | minus loss | 1.000 |" in lines  # both planted tokens have the highest losses
    assert "| R | own step | 0.500 |" in lines  # four clean tokens of 1, above the planted 0 and below the planted 2
    assert lines[-1] == "2 of 6 response tokens are planted."


def test_a_mask_is_told_by_what_it_keeps_of_all_and_of_the_planted_tokens(place):
    assert "| half | 66.7% | 50.0% |" in kept(place, place / "R").splitlines()

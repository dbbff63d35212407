"""The mask stage's memory on parts of different length, measured in processes of their own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from alphatoken.data_schemas import COMPONENTS, PREPARED, values_schema
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.storage import ROWS_PER_GROUP, Storage
from tests.mask.synthetic_run import EOS, ROOT, part_names

COLUMNS = (*COMPONENTS, "loss")
MEASURE = """
import sys, tracemalloc
import pyarrow as pa
from alphatoken.pipeline.run.storage import Storage
from tests.mask.synthetic_run import mask
storage = Storage(sys.argv[1])
pa.set_memory_pool(pa.system_memory_pool())
tracemalloc.start()
mask(storage, score=sys.argv[5], scope=sys.argv[2], rule=sys.argv[3], normalize="rms", rare_tokens=int(sys.argv[4]))
print(tracemalloc.get_traced_memory()[1], pa.default_memory_pool().max_memory())
"""


@pytest.fixture(scope="module")
def growing_runs(tmp_path_factory) -> list[Path]:
    """One part each, of 4 and of 16 row groups."""
    runs, rng = [], np.random.default_rng(0)
    for groups in (4, 16):
        directory, rows, length = tmp_path_factory.mktemp("run"), groups * ROWS_PER_GROUP, 64
        storage = Storage(str(directory))
        manifest, (part,) = Manifest(storage), part_names(1)
        first = manifest.begin("prepare", {}, {})
        second = manifest.begin("value", {"prepare": first, "columns": list(COLUMNS)}, {})
        offsets = pa.array(np.arange(rows + 1) * length, pa.int32())
        ids = pa.array([f"row-{i}" for i in range(rows)])
        tokens = rng.integers(3, 50_000, rows * length).astype(np.int32)
        labels = np.where(np.arange(rows * length) % length < 16, np.int32(-100), tokens)
        lists = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in (tokens, labels)]
        storage.write_table(f"prepared/{part}", pa.Table.from_arrays([ids, *lists, ids], schema=PREPARED), first)
        drawn = [rng.standard_normal(rows * length).astype(np.float32) for _ in COLUMNS]
        lists = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in drawn]
        storage.write_table(
            f"values/{part}", pa.Table.from_arrays([ids, *lists], schema=values_schema(COLUMNS)), second
        )
        manifest.finish("prepare", 0.0, parts=[part], eos_token_ids=[EOS])
        manifest.finish("value", 0.0)
        runs.append(directory)
    return runs


@pytest.mark.parametrize(
    ("score", "scope", "rule", "rare"),
    [
        ("paper", "dataset", "top", 32), ("paper", "example", "top", 32), ("paper", "batch", "top", 32),
        ("paper", "token_id", "top", 0), ("paper", "dataset", "weight", 32), ("paper", "batch", "weight", 32),
        ("random", "dataset", "top", 32),
    ],
)  # fmt: skip
def test_memory_does_not_grow_with_the_part(growing_runs, score, scope, rule, rare):
    peaks = []
    for directory in growing_runs:
        shutil.rmtree(directory / "masks", ignore_errors=True)
        manifest = json.loads((directory / "run.json").read_text())
        manifest["stages"].pop("mask/default", None)
        (directory / "run.json").write_text(json.dumps(manifest))
        found = subprocess.run(
            [sys.executable, "-c", MEASURE, str(directory), scope, rule, str(rare), score],
            check=True, capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        peaks.append([int(n) for n in found.stdout.split()])
    (numpy_small, arrow_small), (numpy_large, arrow_large) = peaks
    data = 16 * ROWS_PER_GROUP * 64 * 4 * 6  # bytes of the larger run's columns that are read
    assert numpy_large < 1.2 * numpy_small and arrow_large < 1.2 * arrow_small, peaks
    per_id = 512 * 50_000 if scope == "token_id" else 0  # every id has a threshold, with and without stability
    assert numpy_large + arrow_large < data + per_id, peaks

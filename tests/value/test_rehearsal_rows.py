"""The rows of a rehearsal: what is found for them comes back from a save and in values/, and the driver's memory does not hold it."""

from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from alphatoken.data_schemas import KEPT, PREPARED
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.value.rehearsal_rows import RehearsedRows
from benchmarks.sums import anonymous

PARTS, LENGTH = 4, 1000


def prepared_in(place: Path, rows: int) -> tuple[Storage, dict[str, int]]:
    """Parts of ``rows`` rows together; the tokens of row i are i, its first one is the prompt."""
    storage, parts = Storage(str(place)), dict[str, int]()
    for part in range(PARTS):
        own = [part * rows // PARTS + i for i in range(rows // PARTS)]
        ids = [np.full(LENGTH, row, np.int32) for row in own]
        labels = [np.concatenate([[-100], one[1:]]).astype(np.int32) for one in ids]
        columns = [[f"row {row}" for row in own], ids, labels, ["train.jsonl"] * len(own)]
        table = pa.Table.from_arrays(
            [pa.array(c, f.type) for c, f in zip(columns, PREPARED, strict=True)], schema=PREPARED
        )
        storage.write_table(f"prepared/part-{part}", table, "f")
        parts[f"part-{part}"] = len(own)
    return storage, parts


def found_for(row: int, columns: int) -> np.ndarray:
    return np.arange(columns * LENGTH, dtype=np.float32).reshape(columns, LENGTH) + row


def fill(data: RehearsedRows, steps: range) -> None:
    for step in steps:
        for row in data.batch(step):
            data.put(row, found_for(row, len(data.columns)))
            data.kept(row)[::3] = True


def test_what_was_found_comes_back_from_a_save_and_stands_in_values(tmp_path):
    storage, parts = prepared_in(tmp_path, 80)
    first, second = (RehearsedRows(storage, parts, Settings()) for _ in range(2))
    assert (first.rows, first.tokens, first.steps) == (80, 80 * LENGTH, 2)
    assert sorted(first.batch(0) + first.batch(1)) == list(range(80))
    group = first.group([5, 79])
    assert group.ids == ["row 5", "row 79"] and (group.input_ids[1] == 79).all()
    assert group.labels[0].tolist() == [-100, *[5] * (LENGTH - 1)] and not first.response(5)[0]
    fill(first, range(1))
    first.save(storage, "saves", (0, 1), "f")
    assert not second.read(storage, "saves", [0, 1, 2], "f") and second.read(storage, "saves", [0, 1], "f")
    fill(second, range(1, 2))
    second.write(storage, "f")
    row = 0
    for part, rows in parts.items():
        table = storage.read_table(f"values/{part}", second.schema)
        assert table.num_rows == rows and table.column("id").to_pylist() == [f"row {row + i}" for i in range(rows)]
        for i in range(rows):
            wanted = found_for(row, len(second.columns))
            for name, column in zip(second.columns, wanted, strict=True):
                assert np.array_equal(table.column(name)[i].values.to_numpy(), column)
            assert table.column(KEPT)[i].as_py() == [at % 3 == 0 for at in range(LENGTH)]
            row += 1
    assert second.kept_tokens() == 80 * len(range(0, LENGTH, 3))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon")
def test_memory_that_no_file_stands_behind_does_not_grow_with_the_tokens(tmp_path):
    storage, parts = prepared_in(tmp_path, 4000)
    pa.default_memory_pool().release_unused()
    before = anonymous(psutil.Process())
    data = RehearsedRows(storage, parts, Settings())
    fill(data, range(data.steps))
    pa.default_memory_pool().release_unused()
    held = data.tokens * (9 + 4 * len(data.columns))
    assert held > 150e6 and anonymous(psutil.Process()) - before < held / 4

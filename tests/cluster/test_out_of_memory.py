"""Out of memory in the middle of a shard: the budget is halved, remembered, and the values are the same."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from alphatoken.data_schemas import PREPARED, SCORES, value_columns, values_schema
from alphatoken.pipeline.anchor.tensors import write_tensors
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings, ValuationSettings
from alphatoken.pipeline.value.kinds import Supervised
from alphatoken.pipeline.value.worker import ValueTask, ValueWorker

COLUMNS = value_columns(tuple(SCORES), exact=True)


@pytest.fixture
def worker(tmp_path, policy):
    """Makes workers over one run directory with random directions and a part of rows of unequal length."""
    from transformers import AutoModelForCausalLM

    from alphatoken.pipeline.maths.decoder import scored_layers

    storage = Storage(str(tmp_path / "run"))
    weights = scored_layers(AutoModelForCausalLM.from_pretrained(policy), 2).weights()
    generator = torch.Generator().manual_seed(0)
    for name in ("adaptation", "stability"):
        direction = {key: torch.randn(w.shape, generator=generator) for key, w in weights.items()}
        write_tensors(storage, f"anchors/snapshot-00/{name}.safetensors", direction, {})
    rows = []
    for index, length in enumerate((9, 30, 14, 22, 11, 27, 16)):
        ids = torch.randint(3, 200, (length,), generator=generator).tolist()
        rows.append({"id": f"row-{index}", "input_ids": ids, "labels": [-100, -100, *ids[2:]], "source": "s"})
    columns = {name: [row[name] for row in rows] for name in PREPARED.names}
    import pyarrow as pa

    storage.write_table("prepared/part.parquet", pa.table(columns, schema=PREPARED), "f")

    def make(budget: int) -> ValueWorker:
        settings = Settings(valuation=ValuationSettings(layers=2, window=4, tokens_per_batch=budget, exact=True))
        return ValueWorker(storage, ModelSource(str(policy)), settings, [0], Supervised(), None)

    return storage, make


def values(storage: Storage) -> list[dict]:
    table = pq.read_table(storage.path("values/part.parquet"))
    assert table.schema.equals(values_schema(COLUMNS))
    return table.to_pylist()


class _Scarce:
    """A device that holds ``most`` padded tokens: refuses larger batches as the device's allocator would."""

    def __init__(self, worker: ValueWorker, most: int) -> None:
        self.scoring, self.most, self.refused, self.shapes = worker.scoring, most, 0, []
        self.columns, self.checked = worker.scoring.columns, worker.scoring.checked

    def __call__(self, batch):
        if batch.shape[0] * batch.shape[1] > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory (as the test says)")
        self.shapes.append(batch.shape)
        return self.scoring(batch)


def test_a_batch_that_does_not_fit_is_halved_and_the_values_are_the_same(worker, monkeypatch):
    storage, make = worker
    make(1000)(ValueTask("part.parquet", "f"), lambda units: None)
    calm = values(storage)
    tight = make(1000)
    scarce = _Scarce(tight, 70)
    monkeypatch.setattr(tight, "scoring", scarce)
    done = []
    tight(ValueTask("part.parquet", "f"), done.append)
    assert scarce.refused >= 1 and all(rows * length <= 70 for rows, length in scarce.shapes)
    assert sum(done) == 9 + 30 + 14 + 22 + 11 + 27 + 16
    for one, other in zip(calm, values(storage), strict=True):
        assert one["id"] == other["id"]
        for name in COLUMNS:
            assert any(one[name])
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-4)
    refused = scarce.refused
    tight(ValueTask("part.parquet", "f"), done.append)
    assert scarce.refused == refused, "the budget that was found is forgotten by the next shard"


def test_an_example_that_does_not_fit_alone_is_named(worker, monkeypatch):
    _, make = worker
    tight = make(1000)
    monkeypatch.setattr(tight, "scoring", _Scarce(tight, 20))
    with pytest.raises(RunFailed, match="row-1.*30 tokens.*data.max_length"):
        tight(ValueTask("part.parquet", "f"), lambda units: None)

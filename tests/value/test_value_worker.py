"""How the value stage uses its device: little padding, one copy to the host per batch, the next shard read meanwhile."""

import json
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from alphatoken.data_schemas import PREPARED, SCORES
from alphatoken.pipeline.anchor.tensors import write_tensors
from alphatoken.pipeline.cluster.pool import WorkerPool
from alphatoken.pipeline.cluster.token_batches import CPU_TOKENS, TokenBatches
from alphatoken.pipeline.cluster.work import Resources, Shard
from alphatoken.pipeline.maths.batch import Sequences, by_token_budget
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.model_source import ModelSource, load_tokenizer
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.prepare.example import HELD_OUT, example_data, example_model
from alphatoken.pipeline.prepare.tokenize import ExampleMaker
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings, ValuationSettings
from alphatoken.pipeline.settings.data import DataSettings
from alphatoken.pipeline.value.kinds import Supervised
from alphatoken.pipeline.value.worker import ValueTask, ValueWorker

SETTINGS = Settings(valuation=ValuationSettings(layers=2, window=4, tokens_per_batch=120))
PARTS = ("part-0.parquet", "part-1.parquet", "part-2.parquet")


@pytest.fixture
def storage(tmp_path, policy) -> Storage:
    """A run directory with two snapshots of random directions and three prepared parts."""
    storage = Storage(str(tmp_path / "run"))
    weights = scored_layers(load_model(ModelSource(str(policy)), torch.device("cpu")), 2).weights()
    generator = torch.Generator().manual_seed(0)
    for snapshot in ("00", "01"):
        for name in ("adaptation", "stability"):
            direction = {key: torch.randn(w.shape, generator=generator) for key, w in weights.items()}
            write_tensors(storage, f"anchors/snapshot-{snapshot}/{name}.safetensors", direction, {})
    for part in PARTS:
        rows = []
        for index, length in enumerate((9, 30, 14, 22, 11, 27, 16, 60, 51, 40)):
            ids = torch.randint(3, 200, (length,), generator=generator).tolist()
            rows.append(
                {"id": f"{part} row {index}", "input_ids": ids, "labels": [-100, -100, *ids[2:]], "source": "s"}
            )
        columns = {name: [row[name] for row in rows] for name in PREPARED.names}
        storage.write_table(f"prepared/{part}", pa.table(columns, schema=PREPARED), "f")
    return storage


def test_padding_of_the_embedded_data_is_under_5_percent():
    model = load_tokenizer(ModelSource(str(example_model())))
    make = ExampleMaker(model, DataSettings().max_length, "auto", {}, len(model))
    lines = Path(example_data()).read_text(encoding="utf-8").splitlines()
    lengths = [len(make(json.loads(line), str(row)).input_ids) for row, line in enumerate(lines)]
    for part in (lengths, lengths[HELD_OUT:]):  # all, and what is left when some are held out
        groups = by_token_budget(part, CPU_TOKENS)
        assert len(groups) > 5
        padded = sum(len(group) * max(part[i] for i in group) for group in groups)
        assert 1 - sum(part) / padded < 0.05


def test_progress_is_counted_in_tokens_after_every_batch_of_a_shard():
    """A shard takes about a minute: counted at its end alone, a display would stand still as long."""
    lengths = (9, 30, 14, 22, 11, 27, 16, 60, 51, 40)
    tokens = [list(range(3, 3 + length)) for length in lengths]
    events: list[tuple[str, int]] = []

    def of_batch(batch):
        events.append(("batch", int(batch.lengths.sum())))
        return {"loss": np.zeros(batch.shape, np.float32)}

    batches = TokenBatches(120, torch.device("cpu"))
    batches.score(
        Sequences([*map(str, lengths)], tokens, tokens), ["loss"], of_batch, lambda n: events.append(("told", n))
    )
    done, told = events[::2], events[1::2]
    assert len(done) > 2 and [("told", count) for _, count in done] == told and sum(n for _, n in told) == sum(lengths)


class _Waits(TorchDispatchMode):
    """Counts single numbers that this package asks the device for; transformers asks once whether rows are packed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += not any("masking_utils" in frame.filename for frame in traceback.extract_stack())
        return func(*args, **(kwargs or {}))


class _Counting:
    """In place of a worker's scoring: notes what each batch asks of the device."""

    def __init__(self, scoring, copies: list[str]) -> None:
        self.scoring, self.columns, self.copies, self.batches = scoring, scoring.columns, copies, []
        self.checked = lambda rows: {}  # before the first batch

    def __call__(self, batch):
        before = len(self.copies)
        with _Waits() as waits:
            found = self.scoring(batch)
        self.batches.append((self.copies[before:], waits.count, {array.base is not None for array in found.values()}))
        return found


@pytest.mark.parametrize(
    ("scores", "exact"),
    [(["paper"], False), (["information"], False), (["loss", "entropy"], False), (list(SCORES), False), ([], True)],
    ids=["paper", "information", "head", "all", "exact"],
)
@pytest.mark.parametrize("snapshots", [1, 2])
def test_a_batch_comes_to_the_host_in_one_copy(storage, policy, monkeypatch, snapshots, scores, exact):
    settings = replace(SETTINGS, valuation=replace(SETTINGS.valuation, scores=scores, exact=exact))
    worker = ValueWorker(storage, ModelSource(str(policy)), settings, list(range(snapshots)), Supervised(), None)
    copies: list[str] = []
    for way in ("cpu", "numpy", "tolist"):
        own = getattr(torch.Tensor, way)
        monkeypatch.setattr(
            torch.Tensor, way, lambda self, *a, own=own, way=way: (copies.append(way), own(self, *a))[1]
        )
    worker.scoring = counting = _Counting(worker.scoring, copies)
    worker(ValueTask(PARTS[0], "f"), lambda units: None)
    assert len(counting.batches) >= 3
    # all columns are parts of one array; besides, one yes or no per snapshot: whether every number is finite
    assert [found for found in counting.batches if found != (["cpu", "numpy"], snapshots, {True})] == []


class _Noting(ValueWorker):
    """Notes when a part is read and when it has been computed, which takes a while."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        pa.array(["this imports pandas, once"])
        note, read, score = self._note, self.storage.read_table, self.batches.score

        def noted(path, *more):
            note(path.removeprefix("prepared/"), "read")
            return read(path, *more)

        def scored(sequences, names, of_batch, advance):
            found = score(sequences, names, lambda batch: (time.sleep(0.4), of_batch(batch))[1], advance)
            note(sequences.ids[0].removesuffix(" row 0"), "computed")
            return found

        self.storage.read_table, self.batches.score = noted, scored

    def _note(self, part: str, what: str) -> None:
        with open(self.storage.path(f"notes-{what}-{part}"), "w") as file:
            file.write(repr(time.monotonic()))


def test_the_next_shard_is_read_while_one_computes_and_before_the_last_is_written(ray_cluster, storage, policy):
    arguments = {
        "storage": storage, "source": ModelSource(str(policy)), "settings": SETTINGS, "snapshots": [0],
        "kind": Supervised(), "reference": None,
    }  # fmt: skip
    results = {}
    with (
        Progress(Console(file=open("/dev/null", "w"))) as progress,
        WorkerPool(_Noting, arguments, Resources(1, 1, 0.0), 60.0, False) as pool,
        progress.task("value", len(PARTS), "shards") as task,
    ):
        shards = [Shard(part, 1) for part in PARTS]
        pool.run(shards, lambda s: ValueTask(s.name, "f"), lambda s, r: results.__setitem__(s.name, r), task)
    assert set(results) == set(PARTS)

    def at(what: str, part: str) -> float:
        return float(Path(storage.path(f"notes-{what}-{part}")).read_text())

    order = sorted(PARTS, key=lambda part: at("read", part))
    for index in (1, 2):  # whenever a part is read, an earlier one is still being computed
        assert at("read", order[index]) < max(at("computed", part) for part in order[:index])
    computed = sorted(at("computed", part) for part in PARTS)
    assert (
        min(b - a for a, b in zip(computed, computed[1:], strict=False)) > 2 * 0.4
    )  # one after the other, not in turns

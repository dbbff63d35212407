"""value, with several checkpoints as model.policy: values at each of them, and their mean.

Checkpoints differ in all weights, so that nothing is shared between them: they are taken one after the other, each with
workers of its own that hold its model and the directions made there. What they write, values/checkpoint-XX/, has the
parts and columns of values/; the mean is taken part by part, in the order of the checkpoints, by workers without a
model. Parts are complete or absent, so that a killed run goes on within the checkpoint that it was at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from alphatoken.data_schemas import SCHEMA_KEY
from alphatoken.pipeline.cluster.work import Shard
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.maths.costs import meta_model
from alphatoken.pipeline.maths.decoder import UnsupportedModel, scored_layers
from alphatoken.pipeline.maths.model_source import ModelSource, load_config
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.fingerprint import digest
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Models, Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.value.worker import ValueTask, ValueWorker


def check_checkpoints(settings: Settings, models: Models) -> None:
    """Raise SettingsWrong where a checkpoint, or the reference, is of another architecture or shape than the first.

    From the configurations alone: no weights are loaded.
    """
    named = [*(("model.policy", path) for path in models.checkpoints), ("model.reference", models.reference)]
    shapes = [_shapes(settings, key, path) for key, path in named]
    for (key, path), other in zip(named, shapes, strict=True):
        if other != shapes[0]:
            wrong = next(n for n in sorted(shapes[0].keys() | other.keys()) if shapes[0].get(n) != other.get(n))
            raise SettingsWrong(
                [f"{key}: {path} differs from {models.policy} at {wrong}: checkpoints of one run have one architecture"]
            )


def _shapes(settings: Settings, key: str, path: str) -> dict[str, Any]:
    """What has to be equal: the kind of model, its vocabulary, and the shape of every scored weight."""
    own = settings.model
    source = ModelSource(path, own.revision, trust_remote_code=own.trust_remote_code)
    model = meta_model(load_config(here(source, weights=False)), torch.float32)
    try:
        scored = scored_layers(model, settings.valuation.layers)
    except UnsupportedModel as error:
        raise SettingsWrong([f"{key}: {path}: {error}"]) from error
    found: dict[str, Any] = {name: tuple(weight.shape) for name, weight in scored.weights().items()}
    found[" architecture"] = type(model).__name__  # sorted before all names
    found[" vocabulary"] = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]  # an nn.Module to mypy
    return found


def checkpoint_place(index: int) -> str:
    """The directory with the values at one checkpoint."""
    return f"values/checkpoint-{index:02d}"


def checkpoint_fingerprint(fingerprint: str, index: int) -> str:
    """What parts at one checkpoint carry; ``fingerprint``: of the whole stage, which covers every checkpoint."""
    return digest({"value": fingerprint, "checkpoint": index})


@dataclass(frozen=True, slots=True)
class MeanTask:
    """One shard: the part's file name, the fingerprint of the mean, and the number of checkpoints."""

    part: str
    fingerprint: str
    checkpoints: int


class MeanWorker:
    """Holds nothing; takes the mean over the checkpoints of one part after the other."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def __call__(self, task: MeanTask, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write one part of values; returns its counts, which are those of one pass over it."""
        tables: list[pa.Table] = []
        counts: dict[str, Any] = {}
        for index in range(task.checkpoints):
            name, own = f"{checkpoint_place(index)}/{task.part}", checkpoint_fingerprint(task.fingerprint, index)
            found = self.storage.counts_of(name, own)
            if found is None:
                raise RunFailed(f"{name} is missing or damaged: run the same command again")
            counts = counts or found
            with pq.ParquetFile(self.storage.path(name), filesystem=self.storage.fs) as file:
                tables.append(file.read())
        self.storage.write_table(f"values/{task.part}", mean_of(tables), task.fingerprint, counts)
        advance(counts["tokens"])
        return counts


def mean_of(tables: Sequence[pa.Table]) -> pa.Table:
    """The mean of every float column, added up in float64 in the order of ``tables`` and rounded once.

    Raises ValueError where rows or lengths are not the same.
    """
    first, columns = tables[0], []
    for field in first.schema:
        own = [table.column(field.name).combine_chunks() for table in tables]
        if pa.types.is_string(field.type):
            if any(not other.equals(own[0]) for other in own):
                raise ValueError(f"{field.name} differs between checkpoints")
            columns.append(own[0])
        elif pa.types.is_list(field.type):
            if any(not other.offsets.equals(own[0].offsets) for other in own):
                raise ValueError(f"lists of {field.name} differ in length between checkpoints")
            flat = pa.array(_mean([column.flatten().to_numpy() for column in own]))
            columns.append(pa.ListArray.from_arrays(own[0].offsets, flat))
        else:
            columns.append(pa.array(_mean([column.to_numpy() for column in own])))
    schema = first.schema.with_metadata(
        {key: value for key, value in first.schema.metadata.items() if key == SCHEMA_KEY}
    )
    return pa.Table.from_arrays(columns, schema=schema)


def _mean(columns: Sequence[np.ndarray]) -> np.ndarray:
    total = np.zeros(len(columns[0]), np.float64)
    for column in columns:
        total += column
    return (total / len(columns)).astype(np.float32)


def value_checkpoints(
    run: Run, arguments: dict[str, Any], fingerprint: str, tokens: Mapping[str, int], rows: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Write the parts ``tokens`` (name -> its tokens) of values/; returns counts to be added up. ``rows``: of every part.

    ``arguments``: of the first checkpoint's workers. A part at a checkpoint that is there already is not made again.
    """
    checkpoints, storage = run.models.checkpoints, run.storage
    engines: list[dict[str, Any]] = []
    for index, checkpoint in enumerate(checkpoints):
        place, own = checkpoint_place(index), checkpoint_fingerprint(fingerprint, index)
        there = storage.footers(place, tokens, own)
        missing = [part for part in tokens if part not in there or there[part].rows != rows[part]]
        title = f"value: checkpoint {index + 1} of {len(checkpoints)}"
        if len(missing) < len(tokens):
            run.progress.say(f"{title}: {len(tokens) - len(missing)} of {len(tokens)} shards are complete already")
        if not missing:
            continue
        theirs = {**arguments, "source": replace(arguments["source"], path=checkpoint), "snapshots": [index]}
        shards = [Shard(part, tokens[part]) for part in missing]
        with (
            run.cluster.pool(logged("value", ValueWorker), theirs, run.cluster.model_resources()) as pool,
            run.progress.task(title, sum(shard.units for shard in shards), "tokens") as task,
        ):
            pool.run(shards, _payload(own, place), lambda s, r: engines.append(r["engine"]), task)
    counts: list[dict[str, Any]] = [{"engine": record} for record in engines]
    with (
        run.cluster.pool(logged("mean", MeanWorker), {"storage": storage}, run.cluster.tokenizer_resources()) as pool,
        run.progress.task("value: mean over checkpoints", sum(tokens.values()), "tokens") as task,
    ):
        pool.run(
            [Shard(part, count) for part, count in tokens.items()],
            lambda s: MeanTask(s.name, fingerprint, len(checkpoints)),
            lambda s, r: counts.append(r),
            task,
        )
    return counts


def _payload(fingerprint: str, place: str) -> Callable[[Shard], ValueTask]:
    return lambda shard: ValueTask(shard.name, fingerprint, place)

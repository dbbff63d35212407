"""How large the files of a run will be: sampled rows are written with the run's own writers and weighed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from data_schemas import COMPONENTS, masks_schema, values_schema
from pipeline.maths.decoder import ScoredLayers
from pipeline.settings import Settings
from pipeline.stages.plan_sample import Sample
from pipeline.stages.prepare import to_table
from pipeline.stages.storage import Storage
from pipeline.stages.tokenize import IGNORED, Example

FINGERPRINT = "0" * 64
HEADER_PER_TENSOR = 120  # bytes of a safetensors header: name, shape, offsets


def directions_bytes(scored: ScoredLayers) -> int:
    """One safetensors file with a float32 matrix for every scored linear map."""
    return 4 * scored.coverage.scored + HEADER_PER_TENSOR * len(scored.maps)


def file_sizes(
    sample: Sample, settings: Settings, scored: ScoredLayers, drift: str, checkpoints: int = 1
) -> dict[str, int]:
    """Bytes by directory of the run, for one mask; several checkpoints leave values of each beside their mean."""
    parts = max(1, -(-sample.train_rows // settings.data.shard_examples))
    seed = settings.run.seed
    snapshots = settings.anchor.snapshots if drift == "warmup" else checkpoints
    copies = checkpoints + 1 if checkpoints > 1 else 1
    tensors = (0 if drift == "none" else 1) + snapshots * (3 if drift == "warmup" else 2)
    held = [_weighed(to_table(some), rows, 1) for some, rows in _held_out(sample)]
    return {
        "prepared": _weighed(to_table(sample.train), sample.train_rows, parts) + sum(held),
        "anchors": tensors * directions_bytes(scored),
        "values": copies * _weighed(_values(sample.train, settings), sample.train_rows, parts),
        "masks, each": _weighed(_mask(sample.train, settings, seed), sample.train_rows, parts),
    }


def _held_out(sample: Sample) -> list[tuple[Sequence[Example], int]]:
    return [(sample.validation, sample.validation_rows), (sample.fisher, len(sample.fisher))]


def _weighed(table: pa.Table, rows: int, parts: int) -> int:
    """Bytes of ``parts`` files with ``rows`` rows like those of ``table``."""
    with tempfile.TemporaryDirectory() as directory:
        storage = Storage(directory)

        def size(name: str, some: pa.Table) -> int:
            storage.write_table(name, some, FINGERPRINT)
            return len(storage.read_bytes(name))

        empty, full = size("empty.parquet", table.slice(0, 0)), size("full.parquet", table)
    return round(parts * empty + (full - empty) * rows / max(1, table.num_rows))


def _values(examples: Sequence[Example], settings: Settings) -> pa.Table:
    """Values as far as their size is concerned: 23 random bits each, and a sign and an exponent that vary as they do."""
    random, window = np.random.default_rng(settings.run.seed), settings.valuation.window
    schema = values_schema(settings.valuation.gradient_norm)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in schema.names[1:]}
    for example in examples:
        response = np.array(example.labels) != IGNORED
        for name, rows in columns.items():
            row = np.zeros(len(response), np.float32)
            if window > 0 or not name.endswith("causal"):
                drawn = random.standard_normal(len(response)) * np.exp(1.5 * random.standard_normal(len(response)))
                drawn = drawn if name in COMPONENTS else np.abs(drawn)
                row[response] = drawn.astype(np.float32)[response]
            rows.append(row)
    ids = pa.array([example.id for example in examples], pa.string())
    lists = [pa.array([row.tolist() for row in rows], pa.list_(pa.float32())) for rows in columns.values()]
    return pa.Table.from_arrays([ids, *lists], schema=schema)


def _mask(examples: Sequence[Example], settings: Settings, seed: int) -> pa.Table:
    """A mask that keeps mask.rho of the response tokens, drawn: real ones are hardly more regular."""
    random = np.random.default_rng(seed)
    schema = masks_schema(settings.mask.extra_columns)
    columns: dict[str, list[list[int]]] = {name: [] for name in schema.names}
    for example in examples:
        labels = np.array(example.labels)
        kept = (labels != IGNORED) & (random.random(len(labels)) < settings.mask.rho)
        flat = {
            "input_ids": np.array(example.input_ids),
            "attention_mask": np.ones(len(labels), int),
            "labels": np.where(kept, labels, IGNORED),
        }
        for name, rows in columns.items():
            rows.append(flat.get(name, kept.astype(int)).tolist())
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)

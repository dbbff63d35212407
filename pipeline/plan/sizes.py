"""How large the files of a run will be: sampled rows are written with the run's own writers and weighed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from alphatoken.data_schemas import (
    BRANCHES,
    PREFERENCE_REFERENCE,
    REFERENCE,
    SIGNED,
    is_signed,
    masks_schema,
    preference_masks_schema,
    preference_values_schema,
    values_schema,
)
from alphatoken.pipeline.anchor.tape import kept_every, tape_bytes
from alphatoken.pipeline.maths.adapters import adapter_weights
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.plan.sample import Sample
from alphatoken.pipeline.prepare.outcome import IGNORED
from alphatoken.pipeline.prepare.tokenize import Example
from alphatoken.pipeline.prepare.worker import to_pair_table, to_table
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

FINGERPRINT = "0" * 64
HEADER_PER_TENSOR = 120  # bytes of a safetensors header: name, shape, offsets


def directions_bytes(scored: ScoredLayers) -> int:
    """One safetensors file with a float32 matrix for every scored linear map."""
    return 4 * scored.coverage.scored + HEADER_PER_TENSOR * len(scored.maps)


def file_sizes(
    sample: Sample, settings: Settings, scored: ScoredLayers, drift: str, checkpoints: int = 1
) -> dict[str, int]:
    """Bytes by directory of the run, for one mask; several checkpoints leave values of each beside their mean."""
    parts = max(1, -(-sample.train_inputs // int(settings.data.shard_examples)))
    anchor = settings.anchor
    snapshots = settings.snapshots(drift, checkpoints)
    fisher = 0 if drift == anchor.precondition == "none" else 1
    each = 2 + len(settings.objectives) + anchor.moves(drift)
    tensors = fisher + snapshots * each if settings.valuation.needs_directions else 0
    held = sum(_weighed(to_table(some), rows, 1) for some, rows in _held_out(sample))
    if (
        sample.pairs and settings.data.holds_out
    ):  # the pairs that a trial measures on stand beside their chosen branches
        held += _weighed(to_pair_table(sample.pairs), sample.validation_rows, 1)
    tables = (_pair_tables if sample.pairs else _tables)(sample, settings, drift)
    found = {name: _weighed(table, sample.train_rows, parts) for name, table in tables.items()}
    found["values"] *= checkpoints + 1 if checkpoints > 1 else 1
    if anchor.unrolled and settings.valuation.needs_directions:  # until the anchors are complete
        unroll = anchor.unroll
        weights = adapter_weights(scored, unroll.adapter_rank) or scored.coverage.scored
        every = kept_every(unroll.steps, weights, unroll.tape_bytes) or 1
        found["tape"] = unroll.orders * tape_bytes(unroll.steps, every, weights)
    anchors = tensors * directions_bytes(scored)
    if settings.valuation.own_step:
        tokens = sample.scale * sum(label != IGNORED for example in sample.train for label in example.labels)
        anchors += round(4 * tokens) * (2 + len(settings.objectives)) * anchor.unroll.orders
    return {"prepared": found.pop("prepared") + held, "anchors": anchors, **found}


def _tables(sample: Sample, settings: Settings, drift: str) -> dict[str, pa.Table]:
    rows, schema = sample.train, masks_schema(settings.mask.extra_columns)
    values = {"id": [example.id for example in rows], **_values(rows, settings, drift)}
    mask, own = _mask(rows, settings, schema.names), values_schema(settings.columns)
    found = {
        "prepared": to_table(rows),
        "values": pa.table([values[name] for name in own.names], schema=own),
        "masks, each": pa.table([mask[name] for name in schema.names], schema=schema),
    }
    if settings.valuation.reference_loss:
        logps = [_drawn(example, np.random.default_rng(0), signed=False) for example in rows]
        found["reference"] = pa.table([values["id"], logps], schema=REFERENCE)
    return found


def _pair_tables(sample: Sample, settings: Settings, drift: str) -> dict[str, pa.Table]:
    pairs, schema = sample.pairs, preference_masks_schema(settings.mask.extra_columns)
    prepared, random = to_pair_table(pairs), np.random.default_rng(settings.run.seed)
    drawn = random.standard_normal((5, len(pairs))).astype(np.float32)
    known: dict[str, Any] = {name: prepared[name] for name in ("id", "prompt", *BRANCHES)} | {"omega": drawn[0]}
    names = [name for name in schema.names if name.startswith("ref_")]
    known |= dict(zip(names, drawn[1:], strict=True))
    for branch in BRANCHES:
        rows = [getattr(pair, branch) for pair in pairs]
        own = {
            **_values(rows, settings, drift),
            **_mask(rows, settings, masks_schema(settings.mask.extra_columns).names),
        }
        own["logps"] = [_drawn(example, random, signed=False) for example in rows]
        known |= {f"{branch}_{name}": column for name, column in own.items()}
    schemas = {
        "values": preference_values_schema(settings.columns),
        "reference": PREFERENCE_REFERENCE,
        "masks, each": schema,
    }
    made = {n: pa.table([known[column] for column in s.names], schema=s) for n, s in schemas.items()}
    return {"prepared": prepared, **made}


def _held_out(sample: Sample) -> list[tuple[Sequence[Example], int]]:
    found: list[tuple[Sequence[Example], int]] = [(sample.validation, sample.validation_rows)]
    kept = [(sample.retention, sample.retention_rows)] if sample.retention else []
    return [*found, (sample.fisher, len(sample.fisher)), *kept]


def _weighed(table: pa.Table, rows: int, parts: int) -> int:
    """Bytes of ``parts`` files with ``rows`` rows like those of ``table``, weighed in files of a part's size."""
    each = max(1, -(-rows // parts))
    with tempfile.TemporaryDirectory() as directory:
        storage = Storage(directory)

        def size(some: pa.Table) -> int:
            storage.write_table("some.parquet", some, FINGERPRINT)
            return len(storage.read_bytes("some.parquet"))

        empty = size(table.slice(0, 0))
        content = sum(size(table.slice(start, each)) - empty for start in range(0, table.num_rows, each))
    return round(parts * empty + content * rows / max(1, table.num_rows))


def _zeros(settings: Settings, drift: str) -> set[str]:
    """The columns of values that are 0.0 throughout and take hardly any room."""
    causal = {name for name in settings.columns if name.endswith("causal") and settings.valuation.window == 0}
    return causal | {name for name in SIGNED if name.startswith("stability") and drift == "none"}


def _values(examples: Sequence[Example], settings: Settings, drift: str) -> dict[str, list[list[float]]]:
    """Values as far as their size is concerned."""
    random, zeros = np.random.default_rng(settings.run.seed), _zeros(settings, drift)
    names = settings.columns
    columns: dict[str, list[list[float]]] = {name: [] for name in names}
    for example in examples:
        for name, rows in columns.items():
            signed = is_signed(name)
            rows.append([0.0] * len(example.labels) if name in zeros else _drawn(example, random, signed))
    return columns


def _drawn(example: Example, random: np.random.Generator, signed: bool) -> list[float]:
    """One column of one example: 23 random bits each, and a sign and an exponent that vary as those of values do."""
    response = np.array(example.labels) != IGNORED
    drawn = random.standard_normal(len(response)) * np.exp(1.5 * random.standard_normal(len(response)))
    return np.where(response, drawn if signed else np.abs(drawn), 0.0).astype(np.float32).tolist()


def _mask(examples: Sequence[Example], settings: Settings, names: Sequence[str]) -> dict[str, list[list[int]]]:
    """A mask that keeps mask.rho of the response tokens, drawn: real ones are hardly more regular."""
    random = np.random.default_rng(settings.run.seed)
    share = 1.0 if settings.mask.score == "full" else settings.mask.rho
    columns: dict[str, list[list[int]]] = {name: [] for name in names}
    for example in examples:
        labels = np.array(example.labels)
        kept = (labels != IGNORED) & (random.random(len(labels)) < share)
        flat = {
            "input_ids": np.array(example.input_ids),
            "attention_mask": np.ones(len(labels), int),
            "labels": np.where(kept, labels, IGNORED),
        }
        for name, rows in columns.items():
            rows.append(flat.get(name, kept.astype(int)).tolist())
    return columns

"""mask: from values to labels that a trainer reads. No model, no torch, memory of a few hundred rows.

The threshold over the data set is exact: a radix selection in two passes over the values. A third pass writes. With
mask.normalize=rms one more pass comes first. The same rows are read each time; nothing is held.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from data_schemas import SCHEMA_KEY, masks_schema
from pipeline.maths.masking import (
    OBJECTIVES,
    Floats,
    RankSelect,
    keep_flat,
    objective,
    rank_of,
    thresholds_in_groups,
    token_values,
)
from pipeline.settings import MaskSettings
from pipeline.stages.always_keep import always_keep_ids
from pipeline.stages.failure import RunFailed
from pipeline.stages.manifest import Manifest
from pipeline.stages.mask_card import card
from pipeline.stages.mask_summary import MaskCounts
from pipeline.stages.paired_rows import IGNORED, PairedParts, PairedRows
from pipeline.stages.storage import Storage

if TYPE_CHECKING:
    from pipeline.stages.progress import Progress

ROWS_AT_ONCE = 256
TIES_WORTH_SAYING = 0.01


def run_mask(
    storage: Storage, manifest: Manifest, settings: MaskSettings, seed: int, progress: Progress | None
) -> dict[str, Any]:
    """Write masks/<name>/ and return its summary, unless done already.

    Parts first, then the card, then summary.json. Goes on where it stopped: a complete part is counted again but not
    written again. ``seed`` is not used, since no rule here is random. Raises SettingsWrong for a token of
    mask.always_keep that does not exist and for settings other than those that the name was begun with, and RunFailed
    for parts that are missing, damaged or do not belong together, and where there is no response token.
    """
    started = time.monotonic()
    values = manifest.require("value", "mask")
    always = always_keep_ids(settings.always_keep, manifest)
    schema = masks_schema(list(dict.fromkeys(settings.extra_columns)))
    stage, place = f"mask/{settings.name}", f"masks/{settings.name}"
    inputs = {
        "values": values["fingerprint"],
        "mask": asdict(settings),
        "schema": (schema.metadata or {})[SCHEMA_KEY].decode(),
    }
    fingerprint = manifest.begin(stage, inputs, {"mask": settings})
    parts_there = manifest.stage("prepare")["counts"]["parts"]
    whole = all(storage.rows_of(f"{place}/{_mask_part(part)}", fingerprint) is not None for part in parts_there)
    if manifest.done(stage) and whole and all(storage.exists(f"{place}/{n}") for n in ("README.md", "summary.json")):
        if progress:
            progress.say(f"mask: {settings.name} is done already")
        return storage.read_json(f"{place}/summary.json")
    rows_at_once = ROWS_AT_ONCE
    if settings.scope == "batch":  # whole groups
        rows_at_once = settings.batch_size * max(1, ROWS_AT_ONCE // settings.batch_size)
    parts = PairedParts(storage, manifest.stage("prepare"), values, rows_at_once)
    work = _Masking(storage, settings, parts, always, progress)
    work.find_scales()
    work.find_thresholds()
    summary = work.write(place, schema, fingerprint)
    storage.write_bytes(f"{place}/README.md", card(summary, schema).encode())
    storage.write_json(f"{place}/summary.json", summary)
    told = ("rows", "response_tokens", "kept_tokens", "kept_fraction")
    manifest.finish(stage, time.monotonic() - started, **{key: summary[key] for key in told})
    return summary


def _mask_part(part: str) -> str:
    return part.replace("part-", "train-", 1)


class _Advancing(Protocol):
    def advance(self, units: int, /) -> None: ...


class _Silent:
    def advance(self, units: int, /) -> None:
        """Show nothing."""


class _Masking:
    """One run of the stage: what the passes find, each building on the one before."""

    def __init__(
        self,
        storage: Storage,
        settings: MaskSettings,
        parts: PairedParts,
        always: np.ndarray,
        progress: Progress | None,
    ) -> None:
        self.storage, self.settings, self.parts, self.always = storage, settings, parts, always
        self.progress = progress
        self.scales = dict.fromkeys(OBJECTIVES, 1.0)
        self.weights = (settings.stability_weight, 0.0)  # of the values, and of adaptation alone for comparison
        self.thresholds: list[np.float32] = []  # mask.scope=dataset: one for each of the weights
        self.notes: list[str] = []
        if "eos" in settings.always_keep and not len(always):
            self._note("the tokenizer names no end-of-sequence token, so that mask.always_keep=eos keeps none")

    def find_scales(self) -> None:
        """mask.normalize=rms: the root mean square of each objective over all response tokens."""
        if self.settings.normalize != "rms":
            return
        tokens, squares = 0, dict.fromkeys(OBJECTIVES, 0.0)
        with self._task("mask: scales", 1) as task:
            for rows in self.parts.all():
                for name in OBJECTIVES:
                    squares[name] += float(np.square(objective(rows.components, name)).sum())
                tokens += int(rows.offsets[-1])
                task.advance(len(rows))
        _some(tokens)
        for name in OBJECTIVES:
            if squares[name]:
                self.scales[name] = float(np.sqrt(squares[name] / tokens))
            else:
                self._note(f"{name} is zero for every token, so that mask.normalize=rms leaves it as it is")

    def find_thresholds(self) -> None:
        """mask.scope=dataset: the threshold over everything, with and without the stability term."""
        if self.settings.scope != "dataset":
            return
        selects = [(weight, RankSelect()) for weight in self.weights]
        with self._task("mask: threshold", 2) as task:
            for rows in self.parts.all():
                for weight, select in selects:
                    select.count(self._values(rows, weight))
                task.advance(len(rows))
            for _, select in selects:
                select.choose(rank_of(self.settings.rho, _some(select.total)))
            for rows in self.parts.all():
                for weight, select in selects:
                    select.refine(self._values(rows, weight))
                task.advance(len(rows))
        self.thresholds = [select.threshold() for _, select in selects]

    def write(self, place: str, schema: pa.Schema, fingerprint: str) -> dict[str, Any]:
        """Write every part that is not complete yet; returns the summary."""
        counts = MaskCounts()
        with self._task("mask: write", 1) as task:
            for part, expected in self.parts.rows.items():
                name = f"{place}/{_mask_part(part)}"
                complete = self.storage.rows_of(name, fingerprint) == expected
                file = nullcontext() if complete else self.storage.table_writer(name, schema, fingerprint)
                with file as out:
                    for rows in self.parts.part(part, with_input_ids=True):
                        kept = self._decide(rows, counts)
                        if out is not None:
                            out.write(_table(rows, kept, schema))
                        task.advance(len(rows))
        _some(counts.response_tokens)
        found = counts.as_json()
        settled = found["kept_tokens"] - found["kept_only_by_always_keep"] - found["kept_only_by_min_kept"]
        if self.thresholds:
            tied = settled - rank_of(self.settings.rho, found["response_tokens"])
            if tied > TIES_WORTH_SAYING * found["response_tokens"]:
                self._note(f"{tied:,} tokens more than mask.rho asks for are kept, since they tie at the threshold")
        return {
            "name": self.settings.name,
            "settings": asdict(self.settings),
            "always_keep_ids": self.always.tolist(),
            "scales": self.scales,
            "threshold": float(self.thresholds[0]) if self.thresholds else None,
            "thresholds": None if self.thresholds else counts.thresholds.as_json(),
            **found,
            "notes": self.notes,
        }

    def _decide(self, rows: PairedRows, counts: MaskCounts) -> np.ndarray:
        """Which tokens are kept, ``(tokens,)`` bool over all tokens of ``rows``; counts them."""
        settings = self.settings
        values, alone = (self._values(rows, weight) for weight in self.weights)
        threshold: Any
        threshold_alone: Any
        if self.thresholds:
            threshold, threshold_alone = self.thresholds
        else:
            size = settings.batch_size if settings.scope == "batch" else 1
            threshold, groups = thresholds_in_groups(values, rows.offsets, size, settings.rho)
            threshold_alone, _ = thresholds_in_groups(alone, rows.offsets, size, settings.rho)
            counts.thresholds.add(groups)
        assert rows.input_ids is not None
        always = np.isin(rows.input_ids.flatten().to_numpy()[rows.response], self.always)
        inside = keep_flat(values, rows.offsets, threshold, always, settings.min_kept)
        columns = {**rows.components, "value": values}
        counts.add(rows.offsets, columns, inside, threshold, always, alone >= threshold_alone)
        kept = np.zeros(len(rows.response), np.bool_)
        kept[rows.response] = inside
        return kept

    def _values(self, rows: PairedRows, weight: float) -> Floats:
        values = token_values(rows.components, weight, self.scales)
        if not np.isfinite(values).all():
            raise RunFailed(f"mask.stability_weight={weight}: values do not fit into float32; choose a smaller one")
        return values

    def _note(self, text: str) -> None:
        self.notes.append(text)
        if self.progress:
            self.progress.say(f"mask: {text}")

    @contextmanager
    def _task(self, name: str, passes: int) -> Iterator[_Advancing]:
        if self.progress is None:
            yield _Silent()
        else:
            with self.progress.task(name, passes * sum(self.parts.rows.values()), "rows") as task:
                yield task


def _some(tokens: int) -> int:
    if not tokens:
        raise RunFailed("no prepared example has a response token: there is nothing to mask")
    return tokens


def _table(rows: PairedRows, kept: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Rows as a masks table: all tokens attended to, labels -100 outside of ``kept``."""
    assert rows.input_ids is not None
    flat = {
        "input_ids": rows.input_ids.flatten(),
        "attention_mask": np.ones(len(kept), np.int8),
        "labels": np.where(kept, rows.labels.flatten().to_numpy(), np.int32(IGNORED)),
    }
    offsets = pa.array(rows.token_offsets(), pa.int32())
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(flat.get(field.name, kept.astype(np.int8)), field.type.value_type))
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)

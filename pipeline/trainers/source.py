"""The rows of one finished mask, some at a time, checked as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from alphatoken.data_schemas import BRANCHES, LOSS_WEIGHT, SchemaMismatch, check, masks_schema, preference_masks_schema
from alphatoken.pipeline.mask.layout import finished_masks, mask_part, open_part, require_shards, summary_of
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.presence import require_run
from alphatoken.pipeline.run.remedies import first, mask_anew
from alphatoken.pipeline.run.storage import Storage

ROWS_AT_ONCE = 64  # of which each may have tens of thousands of tokens


@dataclass(frozen=True, slots=True)
class MaskSource:
    """A finished mask of a run: ``parts`` of prepared/ that its shards belong to, ``summary`` as in summary.json."""

    storage: Storage
    name: str
    parts: tuple[str, ...]
    summary: dict[str, Any]
    pairs: bool
    vocabulary: int | None  # token ids are below it; None: not recorded

    @property
    def weighted(self) -> bool:
        """Whether soft weights, and not labels, carry the mask (mask.rule=weight)."""
        return bool(self.summary["settings"]["rule"] == "weight")

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Of the token columns: none for supervised data, one per branch for pairs."""
        return tuple(f"{branch}_" for branch in BRANCHES) if self.pairs else ("",)

    @property
    def token_columns(self) -> list[str]:
        """Columns with one entry per token that every export starts from."""
        names = ["input_ids", "attention_mask", "labels", *([LOSS_WEIGHT] if self.weighted else [])]
        return [f"{prefix}{name}" for prefix in self.prefixes for name in names]

    def shard(self, part: str) -> str:
        """The file name of the shard, without its folder."""
        return mask_part(self.name, part).rpartition("/")[2]

    def batches(self, part: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """At most ROWS_AT_ONCE rows at a time. Raises RunFailed for a shard that is missing, damaged or of another kind."""
        settings = self.summary["settings"]
        make = preference_masks_schema if self.pairs else masks_schema
        expected = make(list(dict.fromkeys(settings["extra_columns"])), weighted=self.weighted)
        with open_part(self.storage, self.name, part) as file:
            try:
                check(file.schema_arrow, expected, mask_part(self.name, part))
                yield from file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns)
            except (pa.ArrowException, SchemaMismatch, OSError) as error:
                reason = " ".join(str(error).split())
                raise RunFailed(f"{reason}: {mask_anew(self.storage.place, self.name)}") from error


def open_mask(run: str, name: str) -> MaskSource:
    """A mask of the run directory ``run`` (path or URI).

    Raises SettingsWrong where there is no such mask, and RunFailed where there is no run or its shards are not to be found.
    """
    storage = Storage(run)
    require_run(storage, run)
    manifest = Manifest(storage)
    done = finished_masks(storage, manifest)
    if name not in done:
        there = f"there are {', '.join(done)}" if done else f"there is none: {first(storage.place, 'mask')}"
        raise SettingsWrong([f"--mask {name}: {storage.root} has no such mask; {there}"])
    require_shards(storage, name)
    counts = manifest.stage("prepare")["counts"]
    summary = summary_of(storage, name)
    return MaskSource(storage, name, tuple(counts["parts"]), summary, manifest.pairs, counts.get("vocabulary"))

"""Which tokens are kept, and what was decided, in numbers: one branch of the data, rows by rows, in one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from alphatoken.data_schemas import KEPT, LOSS_WEIGHT
from alphatoken.pipeline.mask.left_out import lowest_where
from alphatoken.pipeline.mask.paired_rows import IGNORED, PairedRows
from alphatoken.pipeline.mask.passes import Found
from alphatoken.pipeline.mask.soft_weights import WeightCounts
from alphatoken.pipeline.mask.summary import LeftOutCounts, MaskCounts, RowLengths
from alphatoken.pipeline.mask.thresholds import KEEP_ALL
from alphatoken.pipeline.maths.masking import RANDOM, Bools, Ints, keep_flat, sums_by_row

LOWEST = np.finfo(np.float32).min  # of finite values: the threshold where only tokens that are left out lie below


class Decider:
    """Decides rows by what the passes have found and counts; ``always``: ids that are always kept.

    ``hard``: whether values decide which labels stay.
    """

    def __init__(self, found: Found, always: np.ndarray, hard: bool) -> None:
        self.found, self.always, self.hard = found, always, hard
        self.counts, self.left_out, self.soft = MaskCounts(), LeftOutCounts(), WeightCounts()
        self.lengths = RowLengths()

    def decide(self, rows: PairedRows) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens are kept, bool, and their soft weights, float32: ``(tokens,)`` over all of ``rows``."""
        found, valuing, settings = self.found, self.found.valuing, self.found.valuing.settings
        values, alone = valuing.values(rows), valuing.alone(rows)
        first, unstable, harmful = valuing.first(rows), valuing.least_stable(rows), valuing.harmful(rows)
        left_out = first | unstable | harmful
        ranked = lowest_where(left_out, values)
        threshold, of_groups = found.threshold.of(rows, ranked)
        self.counts.thresholds.add(np.maximum(of_groups, LOWEST))
        # A group may have none but tokens that are left out; where values do not decide all labels stay as they are.
        values_decide = settings.rule != "weight" and (self.hard or settings.score == "full")
        floor = LOWEST if values_decide else KEEP_ALL
        threshold = np.maximum(threshold, floor)
        assert rows.input_ids is not None
        always = np.isin(rows.input_ids.flatten().to_numpy()[rows.response], self.always)
        self.lengths.add(np.diff(rows.token_offsets()))
        self.left_out.add(rows.offsets, first, unstable, harmful, always)
        inside = keep_flat(ranked, rows.offsets, threshold, always, _fewest(settings.min_kept, rows.offsets, always))
        stored = {name: column for name, column in rows.components.items() if name not in (KEPT, RANDOM)}
        columns = {**stored, "value": values}
        without_stability = alone >= np.maximum(found.alone.of(rows, alone)[0], floor)
        self.counts.add(rows.offsets, columns, inside, ranked >= threshold, always, without_stability)
        kept, weights = np.zeros(len(rows.response), np.bool_), np.zeros(len(rows.response), np.float32)
        kept[rows.response] = inside
        if settings.rule == "weight":
            soft = found.soft.of(rows, ranked) if found.soft else np.ones(len(values), np.float32)
            weights[rows.response] = self.soft.add(np.where(left_out, np.float32(0), soft), always)
        return kept, weights


def _fewest(min_kept: int | float, offsets: Ints, always: Bools) -> int | Ints:
    """Tokens that examples keep at least; of a fraction one number for each, ``(examples,)``."""
    if min_kept >= 1 or not min_kept:
        return int(min_kept)
    kept_anyway = sums_by_row(always, offsets)
    return kept_anyway + np.ceil(min_kept * (np.diff(offsets) - kept_anyway)).astype(np.int64)


def mask_columns(rows: PairedRows, kept: np.ndarray, weights: np.ndarray, names: Sequence[str]) -> list[pa.ListArray]:
    """The columns ``names`` of a masks table: all tokens attended to, labels -100 outside of ``kept``."""
    assert rows.input_ids is not None
    made: dict[str, Any] = {
        "input_ids": rows.input_ids.flatten(),
        "attention_mask": pa.array(np.ones(len(kept), np.int8)),
        "labels": pa.array(np.where(kept, rows.labels.flatten().to_numpy(), np.int32(IGNORED))),
        LOSS_WEIGHT: pa.array(weights),
    }
    offsets, flags = pa.array(rows.token_offsets(), pa.int32()), pa.array(kept.astype(np.int8))
    return [pa.ListArray.from_arrays(offsets, made.get(name, flags)) for name in names]

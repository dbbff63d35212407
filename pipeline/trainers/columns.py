"""One batch of a mask's rows -> the columns that a trainer's format has. Lists stay unpadded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

IGNORED = -100


def list_offsets(column: pa.ListArray) -> npt.NDArray[np.int32]:
    """Where each row begins among the flattened tokens, ``(rows + 1,)``, from 0 on."""
    offsets = column.offsets.to_numpy()
    return offsets - offsets[0]


def lengths(column: pa.ListArray) -> pa.Int32Array:
    """Tokens of each row, ``(rows,)``."""
    return pa.array(np.diff(list_offsets(column)), pa.int32())


def shifted(labels: pa.ListArray) -> pa.ListArray:
    """Labels at the predicting position: entry i of a row is its label i + 1, and the last one is -100.

    For trainers that compare the output at position i with label i and do not shift.
    """
    flat, offsets = labels.flatten().to_numpy(), list_offsets(labels)
    moved = np.full(len(flat), IGNORED, np.int32)
    moved[:-1] = flat[1:]
    ends = offsets[1:][np.diff(offsets) > 0]
    moved[ends - 1] = IGNORED
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(moved))


def loss_mask(labels: pa.ListArray) -> pa.ListArray:
    """1 where the token is kept, 0 elsewhere; entry i speaks of token i as a predicted token, as labels do."""
    kept = (labels.flatten().to_numpy() != IGNORED).astype(np.int8)
    return pa.ListArray.from_arrays(pa.array(list_offsets(labels), pa.int32()), pa.array(kept))


def count_kept(labels: pa.ListArray) -> int:
    """Labels that are in the loss."""
    return int((labels.flatten().to_numpy() != IGNORED).sum())

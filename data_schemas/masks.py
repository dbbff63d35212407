"""`masks/<name>/`: what a trainer reads. By default exactly three columns, since trainers raise on more."""

from collections.abc import Sequence

import pyarrow as pa

from alphatoken.data_schemas.version import versioned

MASK_EXTRA_COLUMNS = ("loss_mask", "assistant_masks")
LOSS_WEIGHT = "loss_weight"


def masks_schema(extra_columns: Sequence[str] = (), weighted: bool = False) -> pa.Schema:
    """Schema of a masked supervised part.

    ``extra_columns``: any of ``loss_mask`` and ``assistant_masks``, both 1 where the token is kept in the loss.
    ``weighted``: with LOSS_WEIGHT, and under a name of its own: its labels keep every response token, so that a reader
    of hard masks must not take it for one. Raises ValueError for an unknown extra column.
    """
    unknown = sorted(set(extra_columns) - set(MASK_EXTRA_COLUMNS))
    if unknown:
        raise ValueError(f"unknown extra columns {unknown}; known: {list(MASK_EXTRA_COLUMNS)}")
    return versioned(
        "masks-sft-weighted" if weighted else "masks-sft",
        1,
        [
            pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("attention_mask", pa.list_(pa.int8()), nullable=False),
            # -100 = excluded from the loss.
            pa.field("labels", pa.list_(pa.int32()), nullable=False),
            *[pa.field(name, pa.list_(pa.int8()), nullable=False) for name in extra_columns],
            # What the token's cross-entropy is multiplied with, in [0, 1]; 0.0 outside the response.
            *[pa.field(LOSS_WEIGHT, pa.list_(pa.float32()), nullable=False)] * weighted,
        ],
    )

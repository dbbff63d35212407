"""`masks/<name>/`: what a trainer reads. By default exactly three columns, since trainers raise on more."""

from collections.abc import Sequence

import pyarrow as pa

from data_schemas.version import versioned

MASK_EXTRA_COLUMNS = ("loss_mask", "assistant_masks")


def masks_schema(extra_columns: Sequence[str] = ()) -> pa.Schema:
    """Schema of a masked supervised part.

    ``extra_columns``: any of ``loss_mask`` and ``assistant_masks``, both 1 where the token is kept in the loss.
    Raises ValueError for another name.
    """
    unknown = sorted(set(extra_columns) - set(MASK_EXTRA_COLUMNS))
    if unknown:
        raise ValueError(f"unknown extra columns {unknown}; known: {list(MASK_EXTRA_COLUMNS)}")
    return versioned(
        "masks-sft",
        1,
        [
            pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("attention_mask", pa.list_(pa.int8()), nullable=False),
            # -100 = excluded from the loss.
            pa.field("labels", pa.list_(pa.int32()), nullable=False),
            *[pa.field(name, pa.list_(pa.int8()), nullable=False) for name in extra_columns],
        ],
    )

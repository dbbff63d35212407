"""Preference pairs in every table: the supervised columns twice, prefixed ``chosen_`` and ``rejected_``.

Each branch is prompt and response as one sequence, unpadded and token-aligned like a supervised example.
"""

from collections.abc import Sequence

import pyarrow as pa

from data_schemas.masks import MASK_EXTRA_COLUMNS
from data_schemas.values import COMPONENTS
from data_schemas.version import versioned

BRANCHES = ("chosen", "rejected")
_TEXTS = [pa.field(name, pa.string(), nullable=False) for name in ("prompt", *BRANCHES)]


def _twice(names: Sequence[str], item: pa.DataType) -> list[pa.Field]:
    return [pa.field(f"{branch}_{name}", pa.list_(item), nullable=False) for branch in BRANCHES for name in names]


PREFERENCE_PREPARED = versioned(
    "prepared-preference",
    1,
    [
        pa.field("id", pa.string(), nullable=False),
        *_TEXTS,  # for people, and for trainers that insist on them; the token columns are what counts
        *_twice(("input_ids", "labels"), pa.int32()),
        pa.field("source", pa.string(), nullable=False),
    ],
)

PREFERENCE_VALUES = versioned(
    "values-preference",
    1,
    [
        pa.field("id", pa.string(), nullable=False),
        # beta * sigmoid(-s) at the policy, constant per pair (Eq. 14).
        pa.field("omega", pa.float32(), nullable=False),
        # Components carry sign and scale: +omega for the chosen branch, -omega for the rejected one. Higher is better
        # in both. `loss` is the token's plain cross-entropy under the policy, in nats.
        *_twice((*COMPONENTS, "loss"), pa.float32()),
    ],
)

# `reference/`: same parts and same row order as prepared/. Log-probabilities (nats, at most 0) of the response tokens
# under the reference model; 0.0 outside the response.
PREFERENCE_REFERENCE = versioned(
    "reference-preference", 1, [pa.field("id", pa.string(), nullable=False), *_twice(("logps",), pa.float32())]
)


def preference_masks_schema(extra_columns: Sequence[str] = ()) -> pa.Schema:
    """Schema of a masked preference part.

    ``extra_columns``: any of ``loss_mask`` and ``assistant_masks``, both 1 where the token is kept in the loss.
    Raises ValueError for another name.
    """
    unknown = sorted(set(extra_columns) - set(MASK_EXTRA_COLUMNS))
    if unknown:
        raise ValueError(f"unknown extra columns {unknown}; known: {list(MASK_EXTRA_COLUMNS)}")
    types = {"input_ids": pa.int32(), "attention_mask": pa.int8(), "labels": pa.int32()}
    types |= {name: pa.int8() for name in extra_columns}
    tokens = [
        pa.field(f"{branch}_{name}", pa.list_(item), nullable=False)
        for branch in BRANCHES
        for name, item in types.items()
    ]
    # Reference log-probabilities of a branch, summed over its KEPT tokens, and over all of its response tokens.
    sums = [
        pa.field(f"ref_{branch}_logps{over}", pa.float32(), nullable=False)
        for over in ("", "_all")
        for branch in BRANCHES
    ]
    return versioned("masks-preference", 1, [*_TEXTS, *tokens, *sums])

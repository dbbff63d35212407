"""Preference pairs in every table: the supervised columns twice, prefixed ``chosen_`` and ``rejected_``.

Each branch is prompt and response as one sequence, unpadded and token-aligned like a supervised example.
"""

from collections.abc import Sequence

import pyarrow as pa

from alphatoken.data_schemas.masks import masks_schema
from alphatoken.data_schemas.version import versioned

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


def preference_values_schema(columns: Sequence[str]) -> pa.Schema:
    """Schema of a part of values of pairs with these columns (of ``value_columns``) for each branch."""
    return versioned(
        "values-preference",
        2,
        [
            pa.field("id", pa.string(), nullable=False),
            # beta * sigmoid(-s) at the policy, constant per pair (Eq. 14).
            pa.field("omega", pa.float32(), nullable=False),
            # SIGNED columns carry sign and scale: +omega for the chosen branch, -omega for the rejected one, so that
            # higher is better in both. `gradient_norm` is that of the pair's step, omega times the plain one, so that
            # omega leaves a quotient of both. All others speak of the token alone, as in supervised data.
            *_twice(columns, pa.float32()),
        ],
    )


# `reference/`: same parts and same row order as prepared/. Log-probabilities (nats, at most 0) of the response tokens
# under the reference model; 0.0 outside the response.
PREFERENCE_REFERENCE = versioned(
    "reference-preference", 1, [pa.field("id", pa.string(), nullable=False), *_twice(("logps",), pa.float32())]
)


def preference_masks_schema(extra_columns: Sequence[str] = (), weighted: bool = False) -> pa.Schema:
    """Schema of a masked preference part: a supervised one twice, texts, and sums of the reference's log-probabilities.

    Arguments and errors are those of ``masks_schema``.
    """
    branch_columns = masks_schema(extra_columns, weighted)
    tokens = [pa.field(f"{b}_{field.name}", field.type, nullable=False) for b in BRANCHES for field in branch_columns]
    # Over the branch's KEPT tokens, and over all of its response tokens.
    sums = [pa.field(f"ref_{b}_logps{over}", pa.float32(), nullable=False) for over in ("", "_all") for b in BRANCHES]
    return versioned("masks-preference-weighted" if weighted else "masks-preference", 1, [*_TEXTS, *tokens, *sums])

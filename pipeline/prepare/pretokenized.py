"""Rows of token ids that somebody else made: labels from masks, padding taken off, several sequences in a row refused."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from alphatoken.pipeline.prepare.columns import TOKEN_MASKS, integers, shown, value_of, wrong_type
from alphatoken.pipeline.prepare.outcome import Pretokenized, Unusable

IGNORED = -100
LENGTHS = "seq_lengths"  # TRL: the lengths of the sequences that were packed into a row


def read_tokens(row: Mapping[str, Any], columns: Mapping[str, str]) -> Pretokenized:
    """The one sequence of a row with ``input_ids``, and ``labels`` or masks, or both.

    A mask is 1 at response tokens. Where there are several, or labels as well, a response token is one in all of them
    (as TRL reads them). Raises `Unusable` for lists of other lengths, other values, and rows of several sequences.
    """
    ids = integers(value_of(row, "input_ids", columns), "input_ids")
    column = columns.get("labels") or "labels"
    labels = ids if row.get(column) is None or column in TOKEN_MASKS else integers(row[column], "labels")
    _same_length(ids, labels, "labels")
    for name in TOKEN_MASKS:
        if (bits := _bits(row, name, columns)) is not None:
            _same_length(ids, bits, name)
            labels = [label if bit else IGNORED for label, bit in zip(labels, bits, strict=True)]
    begin, end = _attended(ids, _bits(row, "attention_mask", columns))
    _one_sequence(row, columns, ids, begin, end)
    notes = ("padding_stripped",) if end - begin < len(ids) else ()
    return Pretokenized(ids[begin:end], labels[begin:end], notes)


def _same_length(ids: list[int], values: list[Any], name: str) -> None:
    if len(values) != len(ids):
        raise Unusable(f"lengths_differ: {len(ids)} input_ids and {len(values)} {name}")


def _bits(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> list[bool] | None:
    """A column of zeros and ones, None where the row has none."""
    values = value_of(row, name, columns)
    if values is None:
        return None
    if not isinstance(values, list):
        raise wrong_type(name, values, "a list of 0 and 1")
    for index, value in enumerate(values):
        if value in (0, 1) and isinstance(value, int | float):  # also false and true
            continue
        if not isinstance(value, int | float):
            raise wrong_type(f"{name}[{index}]", value, "0 or 1")
        if name == "attention_mask" and isinstance(value, int) and value > 1:
            raise Unusable(f"packed_row: attention_mask[{index}]={value} counts sequences: give each a row of its own")
        raise Unusable(f"mask_value: {name}[{index}]={shown(value)} is neither 0 nor 1")
    return [bool(value) for value in values]


def _attended(ids: list[int], mask: list[bool] | None) -> tuple[int, int]:
    """From the first token that is attended to through the last: what lies outside is padding."""
    if mask is None:
        return 0, len(ids)
    _same_length(ids, mask, "attention_mask")
    if not any(mask):
        return 0, 0
    begin, end = mask.index(True), len(mask) - mask[::-1].index(True)
    if not all(mask[begin:end]):
        gap = mask.index(False, begin)
        raise Unusable(f"attention_gap: attention_mask[{gap}]=0 between tokens that are attended to")
    return begin, end


def _one_sequence(row: Mapping[str, Any], columns: Mapping[str, str], ids: list[int], begin: int, end: int) -> None:
    """Refuse a row in which several sequences follow one another: each would attend to those before it."""
    lengths = row.get(LENGTHS)
    if isinstance(lengths, list) and len(lengths) > 1:
        raise Unusable(f"packed_row: {LENGTHS} has {len(lengths)} sequences: give each a row of its own")
    positions = value_of(row, "position_ids", columns)
    if positions is None:
        return
    _same_length(ids, integers(positions, "position_ids"), "position_ids")
    for index, (before, after) in enumerate(pairwise(positions[begin:end]), begin + 1):
        if after <= before:
            raise Unusable(
                f"packed_row: position_ids start again at token {index}: give each sequence a row of its own"
            )
        if after != before + 1:
            raise Unusable(f"position_gap: position_ids go from {before} to {after} at token {index}")

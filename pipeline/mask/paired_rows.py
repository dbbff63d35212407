"""prepared/ and values/ side by side, some rows at a time, checked against each other row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from alphatoken.data_schemas import (
    COMPONENTS,
    KEPT,
    PREFERENCE_PREPARED,
    PREPARED,
    REHEARSED_VALUES,
    SchemaMismatch,
    preference_values_schema,
    values_schema,
)
from alphatoken.pipeline.maths.masking import Bools, Floats, Ints
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage

IGNORED = -100


@dataclass(frozen=True, slots=True)
class PairedRows:
    """Consecutive examples of one part, their tokens laid end to end."""

    offsets: Ints  # (examples + 1,): where the response tokens of each example begin among all response tokens
    labels: pa.ListArray
    response: Bools  # (tokens,): whether the token belongs to a response
    components: dict[str, Floats]  # name -> (response tokens,); with the further columns that were asked for
    input_ids: pa.ListArray | None  # None where the pass does not need them

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def response_ids(self) -> npt.NDArray[np.int32]:
        """The ids of the response tokens, ``(response tokens,)``: there, labels are input_ids."""
        return self.labels.flatten().to_numpy()[self.response]

    def token_offsets(self) -> npt.NDArray[np.int32]:
        """Where each example begins among all tokens, ``(examples + 1,)``."""
        starts = self.labels.offsets.to_numpy()
        return starts - starts[0]


class PairedParts:
    """The parts of a run, in their order; memory of ``rows`` rows at a time."""

    def __init__(
        self,
        storage: Storage,
        prepared: Mapping[str, Any],
        values: Mapping[str, Any],
        rows_at_once: int,
        more: Sequence[str] = (),
        branch: str = "",
    ) -> None:
        """``prepared``, ``values``: the stages' records. ``more``: columns of values to read beside the components.
        ``branch``: the branch of preference pairs that is read as if it were supervised data.

        Raises RunFailed for a part that is missing or damaged.
        """
        self.storage, self.rows_at_once = storage, rows_at_once
        self.columns = (*COMPONENTS, *more)
        self.prefix, self.shown = (f"{branch}_", f" ({branch})") if branch else ("", "")
        normed = bool(values["inputs"].get("valuation.gradient_norm"))
        own = (preference_values_schema if branch else values_schema)(normed)
        self.schemas = (PREFERENCE_PREPARED if branch else PREPARED, REHEARSED_VALUES if KEPT in more else own)
        self.rows: dict[str, int] = {}
        for part in prepared["counts"]["parts"]:
            first = storage.rows_of(f"prepared/{part}", prepared["fingerprint"])
            second = storage.rows_of(f"values/{part}", values["fingerprint"])
            if first is None:
                raise _damaged("prepare", f"prepared/{part}", "is missing, damaged or of another run")
            if second is None:
                raise _damaged("value", f"values/{part}", "is missing, damaged or of another run")
            if first != second:
                raise _damaged("value", f"values/{part}", f"has {second} rows, prepared/{part} has {first}")
            self.rows[part] = first

    def all(self) -> Iterator[PairedRows]:
        """Every part, without input_ids."""
        for part in self.rows:
            yield from self.part(part, with_input_ids=False)

    def part(self, part: str, with_input_ids: bool) -> Iterator[PairedRows]:
        """One part, ``rows_at_once`` rows at a time; raises RunFailed that names the file and the row."""
        columns = ["id", "labels", *(["input_ids"] if with_input_ids else [])]
        prepared = self.tables(f"prepared/{part}", self.schemas[0], columns, "prepare")
        values = self.tables(f"values/{part}", self.schemas[1], ["id", *self.columns], "value")
        names, row = (f"prepared/{part}{self.shown}", f"values/{part}{self.shown}"), 0
        for left, right in zip(prepared, values, strict=True):
            yield _paired(left, right, names, row, with_input_ids, self.columns)
            row += left.num_rows

    def tables(self, name: str, schema: pa.Schema, columns: Sequence[str], stage: str) -> Iterator[pa.Table]:
        """Tables of exactly ``rows_at_once`` rows, but for the last: the reader's batches end where row groups do.

        ``columns``: without the branch's prefix, also in the result. ``stage``: to do anew where the file is damaged.
        """
        own = {column if column in schema.names else f"{self.prefix}{column}": column for column in columns}
        for table in self._tables(name, schema, list(own), stage):
            yield table.rename_columns([own[column] for column in table.column_names])

    def _tables(self, name: str, schema: pa.Schema, columns: Sequence[str], stage: str) -> Iterator[pa.Table]:
        held: list[pa.RecordBatch] = []
        missing = self.rows_at_once
        try:
            for batch in self.storage.read_batches(name, schema, self.rows_at_once, columns):
                while batch.num_rows >= missing:
                    yield pa.Table.from_batches([*held, batch.slice(0, missing)]).combine_chunks()
                    batch, held, missing = batch.slice(missing), [], self.rows_at_once
                if batch.num_rows:
                    held.append(batch)
                    missing -= batch.num_rows
        except (pa.ArrowException, OSError, SchemaMismatch) as error:
            raise _damaged(stage, name, f"cannot be read ({' '.join(str(error).split())})") from error
        if held:
            yield pa.Table.from_batches(held).combine_chunks()


def _paired(
    left: pa.Table, right: pa.Table, names: tuple[str, str], row: int, with_input_ids: bool, columns: Sequence[str]
) -> PairedRows:
    """``row``: the number of the first row within the part, for messages."""
    ids = left["id"].to_numpy(), right["id"].to_numpy()
    _refuse("value", names[1], row, ids[0] != ids[1], f"the id is not that of {names[0]}")
    labels = _column(left, "labels")
    lengths = _lengths(labels)
    input_ids = _column(left, "input_ids") if with_input_ids else None
    if input_ids is not None:
        _refuse("prepare", names[0], row, _lengths(input_ids) != lengths, "labels is not as long as input_ids")
    response = _flat(labels, names[0], "prepare", row) != IGNORED
    ends = np.concatenate([[0], np.cumsum(lengths)])
    offsets = np.concatenate([[0], np.cumsum(response)])[ends]
    components = {}
    for name in columns:
        column = _column(right, name)
        _refuse("value", names[1], row, _lengths(column) != lengths, f"{name} is not as long as labels of {names[0]}")
        flat = _flat(column, names[1], "value", row)
        finite = np.isfinite(flat)
        if not finite.all():
            broken = np.searchsorted(ends, np.flatnonzero(~finite), side="right") - 1
            _refuse("value", names[1], row, np.isin(np.arange(len(lengths)), broken), f"NaN or infinity in {name}")
        components[name] = flat[response]
    return PairedRows(offsets, labels, response, components, input_ids)


def _column(table: pa.Table, name: str) -> pa.ListArray:
    chunks = table[name].chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)


def _lengths(column: pa.ListArray) -> npt.NDArray[np.int32]:
    return np.diff(column.offsets.to_numpy())


def _flat(column: pa.ListArray, name: str, stage: str, row: int) -> npt.NDArray[Any]:
    flat = column.flatten()
    if flat.null_count:
        raise _damaged(stage, name, f"has empty list elements in the {len(column)} rows from row {row} on")
    return flat.to_numpy(zero_copy_only=not pa.types.is_boolean(flat.type))


def _refuse(stage: str, name: str, row: int, wrong: npt.NDArray[np.bool_], reason: str) -> None:
    """Raise RunFailed for the first of the rows that is wrong."""
    if wrong.any():
        raise _damaged(stage, name, f"row {row + int(wrong.argmax())}: {reason}")


def _damaged(stage: str, name: str, reason: str) -> RunFailed:
    joint = ", " if reason.startswith("row ") else " "
    return RunFailed(f"{name}{joint}{reason}: make it anew with run.overwrite={stage}")

"""prepared/ and values/ side by side, some rows at a time, checked against each other row by row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alphatoken.data_schemas import (
    KEPT,
    PREFERENCE_PREPARED,
    PREPARED,
    SchemaMismatch,
    preference_values_schema,
    values_schema,
)
from alphatoken.pipeline.maths.masking import RANDOM, Bools, Floats, Ints
from alphatoken.pipeline.maths.uniform import uniform
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.remedies import again, anew
from alphatoken.pipeline.run.run import Run

IGNORED = -100
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PairedRows:
    """Consecutive examples of one part, their tokens laid end to end."""

    offsets: Ints  # (examples + 1,): where the response tokens of each example begin among all response tokens
    labels: pa.ListArray
    response: Bools  # (tokens,): whether the token belongs to a response
    components: dict[str, Floats]  # column that was asked for -> (response tokens,)
    input_ids: pa.ListArray | None  # None where the pass does not need them
    ids: pa.ChunkedArray
    # What has been computed of these rows already: masks that are made together ask for much of the same.
    known: dict[Hashable, Any] = field(default_factory=dict)

    def made(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, computed once for every ``key``."""
        if key not in self.known:
            self.known[key] = make()
        found: T = self.known[key]
        return found

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def response_ids(self) -> npt.NDArray[np.int32]:
        """The ids of the response tokens, ``(response tokens,)``: there, labels are input_ids."""
        return self.made("response ids", lambda: self.labels.flatten().to_numpy()[self.response])

    def token_offsets(self) -> npt.NDArray[np.int32]:
        """Where each example begins among all tokens, ``(examples + 1,)``."""
        starts = self.labels.offsets.to_numpy()
        return starts - starts[0]


class PairedParts:
    """The parts of a run, in their order; memory of ``rows_at_once`` rows at a time. Of pairs, one branch of them.

    ``there``: columns of values/; none where no values are looked at. ``seed``: of the column that mask.score=random
    looks at, which is drawn here. Raises RunFailed for a part that is missing or damaged.
    """

    def __init__(self, run: Run, rows_at_once: int, there: Sequence[str], seed: int, branch: str = "") -> None:
        self.storage, self.rows_at_once, self.there, self.seed = run.storage, rows_at_once, tuple(there), seed
        self.prefix, self.shown = (f"{branch}_", f" ({branch})") if branch else ("", "")
        self.prepared = PREFERENCE_PREPARED if branch else PREPARED
        rehearsed = KEPT in there
        columns = [name for name in there if name != KEPT]
        self.values = preference_values_schema(columns) if branch else values_schema(columns, rehearsed)
        self.rows: dict[str, int] = {}
        prepared, values = run.manifest.stage("prepare"), run.manifest.stage("value")
        parts = prepared["counts"]["parts"]
        firsts = run.storage.footers("prepared", parts, prepared["fingerprint"])
        seconds = run.storage.footers("values", parts, values["fingerprint"]) if there else {}
        for part in parts:
            if part not in firsts:
                raise unfinished(run.storage.place, "prepare", f"prepared/{part}")
            rows = firsts[part].rows
            if there and part not in seconds:
                raise unfinished(run.storage.place, "value", f"values/{part}")
            if there and seconds[part].rows != rows:
                raise damaged(
                    run.storage.place,
                    "value",
                    f"values/{part}",
                    f"has {seconds[part].rows} rows, prepared/{part} has {rows}",
                )
            self.rows[part] = rows

    def all(self, columns: Sequence[str]) -> Iterator[PairedRows]:
        """Every part with these columns, without input_ids."""
        for part in self.rows:
            yield from self.part(part, columns, with_input_ids=False)

    def part(self, part: str, columns: Sequence[str], with_input_ids: bool) -> Iterator[PairedRows]:
        """One part, ``rows_at_once`` rows at a time; raises RunFailed that names the file and the row."""
        read = ["id", "labels", *(["input_ids"] if with_input_ids else [])]
        prepared = self.tables(f"prepared/{part}", self.prepared, read, "prepare")
        stored = [name for name in columns if name != RANDOM]
        names, row = (f"prepared/{part}{self.shown}", f"values/{part}{self.shown}"), 0
        if not stored:
            values: Iterator[pa.Table | None] = repeat(None)
        else:
            values = self.tables(f"values/{part}", self.values, ["id", *stored], "value")
        for left, right in zip(prepared, values, strict=False):
            rows = _paired(self.storage.place, left, right, names, row, with_input_ids, stored)
            if RANDOM in columns:
                rows.components[RANDOM] = self._drawn(left, rows)
            yield rows
            row += left.num_rows

    def _drawn(self, table: pa.Table, rows: PairedRows) -> Floats:
        """mask.score=random, (response tokens,)."""
        branch = self.prefix.rstrip("_")
        names = [f"{name} ({branch})" if branch else name for name in table["id"].to_pylist()]
        lengths = np.diff(rows.token_offsets()).tolist()
        drawn = [uniform(self.seed, name, length) for name, length in zip(names, lengths, strict=True)]
        return np.concatenate([np.zeros(0, np.float32), *drawn])[rows.response]

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
            raise damaged(
                self.storage.place, stage, name, f"cannot be read ({' '.join(str(error).split())})"
            ) from error
        if held:
            yield pa.Table.from_batches(held).combine_chunks()


def _paired(
    place: str,
    left: pa.Table,
    right: pa.Table | None,
    names: tuple[str, str],
    row: int,
    with_input_ids: bool,
    columns: Sequence[str],
) -> PairedRows:
    """``place``: of the run, and ``row``: the number of the first row within the part, both for messages."""
    labels = _column(left, "labels")
    lengths = _lengths(labels)
    input_ids = _column(left, "input_ids") if with_input_ids else None
    if input_ids is not None:
        _refuse(place, "prepare", names[0], row, _lengths(input_ids) != lengths, "labels is not as long as input_ids")
    response = _flat(labels, place, names[0], "prepare", row) != IGNORED
    ends = np.concatenate([[0], np.cumsum(lengths)])
    offsets = np.concatenate([[0], np.cumsum(response)])[ends]
    components: dict[str, Floats] = {}
    if right is None:
        return PairedRows(offsets, labels, response, components, input_ids, left["id"])
    ids = left["id"].to_numpy(), right["id"].to_numpy()
    _refuse(place, "value", names[1], row, ids[0] != ids[1], f"the id is not that of {names[0]}")
    for name in columns:
        column = _column(right, name)
        _refuse(
            place, "value", names[1], row, _lengths(column) != lengths, f"{name} is not as long as labels of {names[0]}"
        )
        flat = _flat(column, place, names[1], "value", row)
        finite = np.isfinite(flat)
        if not finite.all():
            broken = np.searchsorted(ends, np.flatnonzero(~finite), side="right") - 1
            _refuse(
                place, "value", names[1], row, np.isin(np.arange(len(lengths)), broken), f"NaN or infinity in {name}"
            )
        components[name] = flat[response]
    return PairedRows(offsets, labels, response, components, input_ids, left["id"])


def _column(table: pa.Table, name: str) -> pa.ListArray:
    chunks = table[name].chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)


def _lengths(column: pa.ListArray) -> npt.NDArray[np.int32]:
    return np.diff(column.offsets.to_numpy())


def _flat(column: pa.ListArray, place: str, name: str, stage: str, row: int) -> npt.NDArray[Any]:
    flat = column.flatten()
    if flat.null_count:
        raise damaged(place, stage, name, f"has empty list elements in the {len(column)} rows from row {row} on")
    return flat.to_numpy(zero_copy_only=not pa.types.is_boolean(flat.type))


def _refuse(place: str, stage: str, name: str, row: int, wrong: npt.NDArray[np.bool_], reason: str) -> None:
    """Raise RunFailed for the first of the rows that is wrong."""
    if wrong.any():
        raise damaged(place, stage, name, f"row {row + int(wrong.argmax())}: {reason}")


def damaged(place: str, stage: str, name: str, reason: str) -> RunFailed:
    """Of a part that its stage takes for finished, and that is wrong all the same."""
    joint = ", " if reason.startswith("row ") else " "
    return RunFailed(f"{name}{joint}{reason}: make it anew, {anew(place, stage)}")


def unfinished(place: str, stage: str, name: str) -> RunFailed:
    """Of a part that its stage does not take for finished either, and so makes again."""
    return RunFailed(f"{name} is missing, damaged or of another run: {again(place, stage)}")

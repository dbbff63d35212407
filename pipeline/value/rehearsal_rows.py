"""The rows of a rehearsal: prepared examples in the order in which they have their turn, and what was found for them.

The order is drawn over the whole data set, and a part of values/ is complete only when the last of its rows has had its
turn, so that all of it is needed until the end: 9 bytes per token and 4 per column of values/, in files on the driver's disk
that it maps. What is in memory are the batch and, of every row, its id, its place and its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from alphatoken.data_schemas import KEPT, PREPARED, values_schema
from alphatoken.pipeline.maths.batch import IGNORED
from alphatoken.pipeline.maths.masking import Bools, Floats
from alphatoken.pipeline.maths.rehearsal import lanes_of
from alphatoken.pipeline.prepare.draw import draw_order
from alphatoken.pipeline.run.on_disk import on_disk, zeros_on_disk
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.value.rehearsal_worker import Group

Tokens = npt.NDArray[np.int32]


class RehearsedRows:
    """Rows are numbered over all parts, from 0. Their order is drawn with run.seed. ``parts``: part -> its rows."""

    def __init__(self, storage: Storage, parts: Mapping[str, int], settings: Settings) -> None:
        self.parts, self.batch_size = parts, settings.valuation.rehearsal.batch_size
        self.columns = settings.valuation.columns
        self.schema = values_schema(self.columns, rehearsed=True)
        self._read = _Sequences.of_parts(storage, [f"prepared/{part}" for part in parts])
        self.rows, self.tokens = sum(parts.values()), int(self._read.offsets[-1])
        self.steps = -(-self.rows // self.batch_size)
        self.order = np.fromiter(draw_order(self.rows, settings.run.seed), np.int64, self.rows)
        self._values = [zeros_on_disk(np.float32, self.tokens) for _ in self.columns]
        self._kept = zeros_on_disk(np.bool_, self.tokens)
        self._storage = storage

    def batch(self, step: int) -> list[int]:
        """The rows that have their turn at ``step``."""
        return self._rows_of((step, step + 1))

    def input_ids(self, row: int) -> Tokens:
        """(length,)."""
        return self._read.input_ids[self._read.of(row)]

    def labels(self, row: int) -> Tokens:
        """(length,), -100 outside the response."""
        return self._read.labels[self._read.of(row)]

    def response(self, row: int) -> Bools:
        """(length,): whether the token belongs to the response."""
        return self.labels(row) != IGNORED

    def kept(self, row: int) -> Bools:
        """(length,), to be written to."""
        return self._kept[self._read.of(row)]

    def column(self, name: str, row: int) -> Floats:
        """(length,)."""
        return self._values[self.columns.index(name)][self._read.of(row)]

    def put(self, row: int, columns: Floats) -> None:
        """``columns`` (columns of values/, at least length): the row's values, with padding."""
        place = self._read.of(row)
        for target, column in zip(self._values, columns, strict=True):
            target[place] = column[: place.stop - place.start]

    def group(self, rows: Sequence[int]) -> Group:
        """Rows of one pass."""
        return self._read.group(rows)

    def validation_groups(self, budget: int) -> list[list[Group]]:
        """The validation set by lane and pass."""
        read = _Sequences.of_parts(self._storage, ["prepared/validation.parquet"])
        lanes = lanes_of(np.diff(read.offsets).tolist(), budget)
        return [[read.group(group) for group in lane] for lane in lanes]

    def kept_tokens(self) -> int:
        """Over all rows so far."""
        return int(self._kept.sum())

    def write(self, storage: Storage, fingerprint: str) -> None:
        """Write the parts of values/."""
        start = 0
        for part, size in self.parts.items():
            storage.write_table(f"values/{part}", self._table(range(start, start + size)), fingerprint)
            start += size

    def save(self, storage: Storage, place: str, steps: tuple[int, int], fingerprint: str) -> None:
        """Write what was found at the steps from the first to before the second, below ``place``."""
        storage.write_table(_name(place, steps), self._table(self._rows_of(steps)), fingerprint)

    def read(self, storage: Storage, place: str, saves: Sequence[int], fingerprint: str) -> bool:
        """Read what was saved between each two of ``saves``; False where a file is missing or damaged."""
        for steps in zip(saves[:-1], saves[1:], strict=True):
            rows = self._rows_of(steps)
            if storage.rows_of(_name(place, steps), fingerprint) != len(rows):
                return False
            table = storage.read_table(_name(place, steps), self.schema)
            names = (*self.columns, KEPT)
            flat = [table[n].combine_chunks().flatten().to_numpy(zero_copy_only=False) for n in names]
            start = 0
            for row in rows:
                place_of = self._read.of(row)
                stop = start + place_of.stop - place_of.start
                for target, column in zip(self._values, flat, strict=False):
                    target[place_of] = column[start:stop]
                self._kept[place_of] = flat[-1][start:stop]
                start = stop
        return True

    def _rows_of(self, steps: tuple[int, int]) -> list[int]:
        return self.order[steps[0] * self.batch_size : steps[1] * self.batch_size].tolist()

    def _table(self, rows: Sequence[int]) -> pa.Table:
        places = [self._read.of(row) for row in rows]
        offsets = np.concatenate([[0], np.cumsum([p.stop - p.start for p in places])]).astype(np.int32)
        ids = pa.array(self._read.names(rows), pa.string())
        lists = [_lists(offsets, (column[p] for p in places), column.dtype) for column in (*self._values, self._kept)]
        return pa.Table.from_arrays([ids, *lists], schema=self.schema)


@dataclass(frozen=True, slots=True)
class _Sequences:
    """Rows of prepared tables as flat arrays, those of tokens on disk. ``ids`` (rows,), ``offsets`` (rows + 1,)."""

    ids: pa.ChunkedArray
    offsets: npt.NDArray[np.int64]
    input_ids: Tokens
    labels: Tokens

    @classmethod
    def of_parts(cls, storage: Storage, parts: Sequence[str]) -> _Sequences:
        """All rows of ``parts``, one after the other."""
        ids: list[pa.Array] = []
        lengths: list[npt.NDArray] = []

        def flat(column: str, see: Callable[[pa.Array], None] = lambda _: None) -> Iterable[Tokens]:
            for part in parts:
                for rows in storage.read_batches(part, PREPARED, columns=[column]):
                    see(rows.column(0))
                    yield rows.column(0).flatten().to_numpy()

        for part in parts:
            ids += [rows.column(0) for rows in storage.read_batches(part, PREPARED, columns=["id"])]
        input_ids = on_disk(
            np.int32, flat("input_ids", lambda rows: lengths.append(pc.list_value_length(rows).to_numpy()))
        )
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))] if lengths else [[0]]).astype(np.int64)
        return cls(pa.chunked_array(ids, pa.string()), offsets, input_ids, on_disk(np.int32, flat("labels")))

    def names(self, rows: Sequence[int]) -> list[str]:
        """Their ids."""
        return self.ids.take(pa.array(rows, pa.int64())).to_pylist()

    def of(self, row: int) -> slice:
        """The place of a row's tokens."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    def group(self, rows: Sequence[int]) -> Group:
        """Rows of one pass."""
        places = [self.of(row) for row in rows]
        return Group(self.names(rows), [self.input_ids[p] for p in places], [self.labels[p] for p in places])


def _lists(offsets: npt.NDArray[np.int32], rows: Iterable[Any], dtype: np.dtype) -> pa.ListArray:
    flat = np.concatenate([np.zeros(0, dtype), *rows])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _name(place: str, steps: tuple[int, int]) -> str:
    return f"{place}/steps-{steps[0]:07d}-to-{steps[1]:07d}.parquet"

"""The rows of a rehearsal: prepared examples in the order in which they have their turn, and what was found for them.

All of it is in the driver's memory, about 30 bytes per token: the order is drawn over the whole data set, and a part of
values/ is complete only when the last of its rows has had its turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.value.rehearsal_worker import Group

Tokens = npt.NDArray[np.int32]


class RehearsedRows:
    """Rows are numbered over all parts, from 0. Their order is drawn with run.seed."""

    def __init__(self, storage: Storage, parts: Sequence[str], settings: Settings) -> None:
        self.parts, self.batch_size = parts, settings.valuation.rehearsal.batch_size
        self.columns = settings.valuation.columns
        self.schema = values_schema(self.columns, rehearsed=True)
        tables = [storage.read_table(f"prepared/{part}", PREPARED) for part in parts]
        self.sizes = [table.num_rows for table in tables]
        self._read = _Sequences(pa.concat_tables(tables))
        self.rows, self.tokens = len(self._read.ids), int(self._read.offsets[-1])
        self.steps = -(-self.rows // self.batch_size)
        self.order = list(draw_order(self.rows, settings.run.seed))
        self._values = np.zeros((len(self.columns), self.tokens), np.float32)
        self._kept = np.zeros(self.tokens, np.bool_)
        self._storage = storage

    def batch(self, step: int) -> list[int]:
        """The rows that have their turn at ``step``."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

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
        return self._values[self.columns.index(name), self._read.of(row)]

    def put(self, row: int, columns: Floats) -> None:
        """``columns`` (columns of values/, at least length): the row's values, with padding."""
        place = self._read.of(row)
        self._values[:, place] = columns[:, : place.stop - place.start]

    def group(self, rows: Sequence[int]) -> Group:
        """Rows of one pass."""
        return self._read.group(rows)

    def validation_groups(self, budget: int) -> list[list[Group]]:
        """The validation set by lane and pass."""
        read = _Sequences(self._storage.read_table("prepared/validation.parquet", PREPARED))
        lanes = lanes_of(np.diff(read.offsets).tolist(), budget)
        return [[read.group(group) for group in lane] for lane in lanes]

    def kept_tokens(self) -> int:
        """Over all rows so far."""
        return int(self._kept.sum())

    def write(self, storage: Storage, fingerprint: str) -> None:
        """Write the parts of values/."""
        start = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
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
        return self.order[steps[0] * self.batch_size : steps[1] * self.batch_size]

    def _table(self, rows: Sequence[int]) -> pa.Table:
        places = [self._read.of(row) for row in rows]
        offsets = np.concatenate([[0], np.cumsum([p.stop - p.start for p in places])]).astype(np.int32)
        ids = pa.array([self._read.ids[row] for row in rows], pa.string())
        lists = [_lists(offsets, (column[p] for p in places), column.dtype) for column in (*self._values, self._kept)]
        return pa.Table.from_arrays([ids, *lists], schema=self.schema)


class _Sequences:
    """A prepared table as flat arrays; ``offsets`` (rows + 1,)."""

    def __init__(self, table: pa.Table) -> None:
        self.ids: list[str] = table.column("id").to_pylist()
        lengths = pc.list_value_length(table.column("input_ids")).to_numpy()
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.input_ids, self.labels = (_flat(table.column(name)) for name in ("input_ids", "labels"))

    def of(self, row: int) -> slice:
        """The place of a row's tokens."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    def group(self, rows: Sequence[int]) -> Group:
        """Rows of one pass."""
        places = [self.of(row) for row in rows]
        return Group(
            [self.ids[row] for row in rows], [self.input_ids[p] for p in places], [self.labels[p] for p in places]
        )


def _flat(column: pa.ChunkedArray) -> Tokens:
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int32)


def _lists(offsets: npt.NDArray[np.int32], rows: Iterable[Any], dtype: np.dtype) -> pa.ListArray:
    flat = np.concatenate([np.zeros(0, dtype), *rows])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _name(place: str, steps: tuple[int, int]) -> str:
    return f"{place}/steps-{steps[0]:07d}-to-{steps[1]:07d}.parquet"

"""The two kinds of data: how a shard becomes sequences, and how their columns become a part of values/.

A worker holds one of them; nothing else in this folder asks which kind the data is of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch

from alphatoken.data_schemas import (
    BRANCHES,
    PREFERENCE_PREPARED,
    PREFERENCE_REFERENCE,
    PREPARED,
    REFERENCE,
    is_signed,
    preference_values_schema,
    values_schema,
)
from alphatoken.pipeline.cluster.token_batches import as_lists
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.preference import margin, pair_weight
from alphatoken.pipeline.prepare.reader import branches_of, sequences_of

Rows = Sequence[np.ndarray]  # one float array per sequence, over its tokens


class Kind(Protocol):
    """``prepared``, ``reference``: schemas of these tables. ``weighed``: whether values depend on the policy's own loss."""

    prepared: pa.Schema
    reference: pa.Schema
    weighed: bool

    def sequences(self, table: pa.Table) -> Sequences:
        """The sequences of a prepared part."""

    def schema(self, columns: Sequence[str]) -> pa.Schema:
        """Of a part of values/ with these columns."""

    def values(
        self, table: pa.Table, columns: Mapping[str, Rows], own: Rows | None, theirs: Rows | None, names: Sequence[str]
    ) -> pa.Table:
        """A part of values/ with the columns ``names``. ``own``, ``theirs``: log-probabilities under policy and reference."""

    def logps(self, reference: pa.Table) -> Rows:
        """Of a part of reference/, one array per sequence."""

    def with_logps(self, ids: pa.ChunkedArray, logps: Rows) -> pa.Table:
        """A part of reference/."""


class Supervised:
    """One sequence per row; columns stay as they are."""

    prepared, reference, weighed = PREPARED, REFERENCE, False

    def sequences(self, table: pa.Table) -> Sequences:
        """See Kind."""
        return sequences_of(table)

    def schema(self, columns: Sequence[str]) -> pa.Schema:
        """See Kind."""
        return values_schema(columns)

    def values(
        self, table: pa.Table, columns: Mapping[str, Rows], own: Rows | None, theirs: Rows | None, names: Sequence[str]
    ) -> pa.Table:
        """See Kind."""
        arrays = [table.column("id").combine_chunks(), *[as_lists(columns[name]) for name in names]]
        return pa.Table.from_arrays(arrays, schema=self.schema(names))

    def logps(self, reference: pa.Table) -> Rows:
        """See Kind."""
        return _rows(reference, "logps")

    def with_logps(self, ids: pa.ChunkedArray, logps: Rows) -> pa.Table:
        """See Kind."""
        return pa.table([ids, as_lists(logps)], schema=REFERENCE)


class Pairs:
    """Two sequences per row, all chosen branches before all rejected ones; signed and scaled by omega (Eq. 14).

    ``beta``: of DPO. A training step on a pair goes along omega times the gradient of the chosen branch's loss and against
    that of the rejected one, so that signed columns are scaled by +omega and -omega, gradient norms by omega.
    """

    prepared, reference, weighed = PREFERENCE_PREPARED, PREFERENCE_REFERENCE, True

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def sequences(self, table: pa.Table) -> Sequences:
        """See Kind."""
        return branches_of(table)

    def schema(self, columns: Sequence[str]) -> pa.Schema:
        """See Kind."""
        return preference_values_schema(columns)

    def values(
        self, table: pa.Table, columns: Mapping[str, Rows], own: Rows | None, theirs: Rows | None, names: Sequence[str]
    ) -> pa.Table:
        """See Kind."""
        assert own is not None and theirs is not None
        omega = omegas(_halves(own), _halves(theirs), self.beta)
        arrays = {"id": table.column("id"), "omega": pa.array(omega, pa.float32())}
        for name in names:
            for branch, sign in zip(BRANCHES, (1.0, -1.0), strict=True):
                rows = _halves(columns[name])[branch]
                if is_signed(name) or name == "gradient_norm":
                    factors = omega * (sign if is_signed(name) else 1.0)
                    rows = [(row * w).astype(np.float32) for row, w in zip(rows, factors, strict=True)]
                arrays[f"{branch}_{name}"] = as_lists(rows)
        schema = self.schema(names)
        return pa.table([arrays[name] for name in schema.names], schema=schema)

    def logps(self, reference: pa.Table) -> Rows:
        """See Kind."""
        return [row for branch in BRANCHES for row in _rows(reference, f"{branch}_logps")]

    def with_logps(self, ids: pa.ChunkedArray, logps: Rows) -> pa.Table:
        """See Kind."""
        halves = _halves(logps)
        return pa.table([ids, *[as_lists(halves[branch]) for branch in BRANCHES]], schema=PREFERENCE_REFERENCE)


def omegas(policy: Mapping[str, Rows], reference: Mapping[str, Rows], beta: float) -> np.ndarray:
    """omega of every pair, ``(pairs,)`` float64, from the log-probabilities of its branches' response tokens."""
    own, theirs = ({b: _sums(model[b]) for b in BRANCHES} for model in (policy, reference))
    s = margin(own["chosen"], own["rejected"], theirs["chosen"], theirs["rejected"], beta)
    return pair_weight(s, beta).numpy()


def _halves(rows: Rows) -> dict[str, Rows]:
    """Branch -> its rows, of one entry per sequence."""
    middle = len(rows) // 2
    return {"chosen": rows[:middle], "rejected": rows[middle:]}


def _sums(rows: Rows) -> torch.Tensor:
    return torch.tensor([float(row.sum(dtype=np.float64)) for row in rows], dtype=torch.float64)


def _rows(table: pa.Table, name: str) -> list[np.ndarray]:
    column = table.column(name).combine_chunks()
    flat, ends = column.flatten().to_numpy(), column.offsets.to_numpy()
    return np.split(flat, ends[1:-1] - ends[0]) if len(column) else []

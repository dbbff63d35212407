"""The columns of valuation.schedule=own_step, which the sweep over the simulated runs has found: their mean over the orders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alphatoken.data_schemas import UNROLLED
from alphatoken.pipeline.anchor.own_step import PLACE, TOKENS
from alphatoken.pipeline.anchor.tensors import mapped_tensors
from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.remedies import anew
from alphatoken.pipeline.run.storage import Storage


class OwnStepValues:
    """``orders``: of the simulated runs; ``objectives``: those that have a column."""

    def __init__(self, storage: Storage, orders: int, objectives: Sequence[str]) -> None:
        self.place, self.objectives = storage.place, tuple(objectives)
        runs = [mapped_tensors(storage, PLACE.format(order=order)) for order in range(orders)]
        self.starts = np.concatenate([[0], np.cumsum(runs[0][TOKENS].numpy().astype(np.int64))])
        nothing = np.zeros(int(self.starts[-1]), np.float64)  # stability without a drift
        self.means = {}
        for name in self.objectives:
            own = [run[name].numpy().astype(np.float64) for run in runs if name in run]
            self.means[name] = (sum(own, nothing) / orders).astype(np.float32)

    def columns(self, sequences: Sequences, first: int) -> dict[str, list[np.ndarray]]:
        """Column -> one array per sequence, 0.0 outside the response; ``first``: the first one's number among all rows."""
        found: dict[str, list[np.ndarray]] = {f"{name}{UNROLLED}": [] for name in self.objectives}
        for row, labels in enumerate(sequences.labels, start=first):
            inside = np.array(labels) != IGNORED
            own = slice(self.starts[row], self.starts[row + 1])
            if own.stop - own.start != inside.sum():
                raise RunFailed(
                    f"anchors/ has values of other rows than row {row} of prepared/: make them anew, "
                    f"{anew(self.place, 'anchor')}"
                )
            for name in self.objectives:
                values = np.zeros(len(labels), np.float32)
                values[inside] = self.means[name][own]
                found[f"{name}{UNROLLED}"].append(values)
        return found

"""valuation.schedule=own_step: each token's value at the steps that train on it, gathered while the sweep goes back.

    value_i = sum over the steps t that train on i of  -1/N_t <grad l_i(W_t) - g_t, r_t>

It is minus the derivative of the objective at the end of the run by the token's weight in the loss, exact to first order,
where snapshots say what a step on the token would do at some points of the run. It costs nothing beside the sweep, in all
layers that the run trains, but has a value only for rows that the run trains on: it has to train on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.settings.unroll import UnrollSettings

PLACE = "anchors/own-step-{order:02d}.safetensors"
TOKENS = "tokens"  # of that file: response tokens of every row; all else is objective -> values over all of them


def check_covered(rows: int, unroll: UnrollSettings) -> None:
    """Raises SettingsWrong where the run does not train on all ``rows`` training rows."""
    reached = min(unroll.examples, unroll.steps * unroll.batch_size)
    if reached < rows:
        steps = -(-rows // unroll.batch_size)
        raise SettingsWrong(
            [
                f"valuation.schedule=own_step values what the simulated run trains on: {reached} of {rows} training rows: set "
                f"anchor.unroll.examples={rows} anchor.unroll.steps={max(steps, unroll.steps)}, or valuation.schedule=static"
            ]
        )


class OwnSteps:
    """Objective -> the sum of the values of each response token of ``examples``, row after row, over the steps added."""

    def __init__(self, examples: Sequences, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """``state``: what ``state`` gave, to go on from there."""
        self.tokens = [sum(label != IGNORED for label in labels) for labels in examples.labels]
        self.starts = [0]
        for count in self.tokens:
            self.starts.append(self.starts[-1] + count)
        self.found = {name: tensor.clone() for name, tensor in (state or {}).items()}

    def add(self, rows: Sequence[int], values: Mapping[str, torch.Tensor]) -> None:
        """One step: ``values`` (n,) of the response tokens of ``rows``, one row after the other."""
        for objective, every in values.items():
            total = self.found.setdefault(objective, torch.zeros(self.starts[-1]))
            parts = every.cpu().float().split([self.tokens[row] for row in rows])
            for row, part in zip(rows, parts, strict=True):
                total[self.starts[row] : self.starts[row + 1]] += part

    def state(self) -> dict[str, torch.Tensor]:
        """Objective -> values so far; not copies."""
        return self.found

    def as_file(self) -> dict[str, torch.Tensor]:
        """What is kept of a whole order."""
        return {**self.found, TOKENS: torch.tensor(self.tokens, dtype=torch.float32)}

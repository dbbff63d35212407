"""What became of a model in a trial: held-out rows, rows that should not be forgotten, divergence from the reference."""

from __future__ import annotations

from typing import Any

import torch

from alphatoken.pipeline.maths.divergence import ReferencePredictions
from alphatoken.pipeline.maths.learners import Learner, Weights
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.trial import Fit, held_out_losses
from alphatoken.pipeline.trial.entering import TrialStates
from alphatoken.pipeline.trial.kinds import TrialKind


class Measures:
    """Called with what has been learned; returns a part of the fine-tune's result, or why there is none."""

    def __init__(
        self, learner: Learner, kind: TrialKind, states: TrialStates, predictions: ReferencePredictions
    ) -> None:
        self.learner, self.kind, self.states, self.predictions = learner, kind, states, predictions

    def __call__(self, weights: Weights, fit: Fit) -> dict[str, Any]:
        """``adaptation``, ``retention`` and what belongs to them, see data_schemas/trial.py; else ``failed``."""
        sums = {}
        for what in [name for name in ("held-out", "retention") if name in self.states.sets]:
            rows = self.states.entering(what)
            try:
                sums[what] = held_out_losses(self.learner, weights, rows, fit)
            except NonFinite as error:
                return {"failed": f"NaN or infinity in {error.where}, example {rows.sequences.ids[error.row]}"}
        moved, positions = self.predictions.divergences(self.learner, weights, self.states.entering("completions"))
        divergence = _mean(moved, positions)
        if not divergence < float("inf"):
            return {"failed": "NaN or infinity in the predictions on the reference's completions"}
        found = {**self.kind.held_out(*sums["held-out"]), "retention": divergence}
        if "retention" in sums:
            found["retention_loss"] = _mean(*sums["retention"])
        return found


def _mean(sums: torch.Tensor, counts: torch.Tensor) -> float:
    return float(sums.sum() / counts.sum())

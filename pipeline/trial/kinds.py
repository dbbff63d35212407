"""The two kinds of data in a trial: what a fine-tune lowers, and what is said of held-out rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.forward import response_logps
from alphatoken.pipeline.maths.learners import Learner
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.pair_trial import MaskedPairs, margins, pair_losses, reward_accuracy
from alphatoken.pipeline.maths.trial import Entering, Fit, LabelledTokens, Objective, held_out_losses
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.trial.entering import TrialRows, TrialStates


class TrialKind(Protocol):
    """``knows_reference``: whether what the reference says has been seen, where it is needed."""

    knows_reference: bool

    def examples(self, rows: Sequences) -> int:
        """How many examples the sequences are."""

    def sequences(self, examples: Iterable[int], rows: Sequences) -> list[int]:
        """The sequences of some examples."""

    def see_reference(self, model: Any, kernel: str, budget: int) -> None:
        """Note what the reference, a model of its own, says."""

    def see_policy(self, learner: Learner, states: TrialStates, fit: Fit) -> None:
        """The same where the untouched policy is the reference."""

    def objective(self, rows: Entering, labels: Sequence[Sequence[int]]) -> Objective:
        """What a fine-tune lowers on ``rows``, which have ``labels``."""

    def held_out(self, losses: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
        """Results of held-out sequences' summed cross-entropies, nats, and their tokens."""


class SupervisedTrial:
    """Cross-entropy of labelled tokens."""

    knows_reference = True

    def examples(self, rows: Sequences) -> int:
        """See TrialKind."""
        return len(rows)

    def sequences(self, examples: Iterable[int], rows: Sequences) -> list[int]:
        """See TrialKind."""
        return list(examples)

    def see_reference(self, model: Any, kernel: str, budget: int) -> None:
        """It has nothing to say here."""

    def see_policy(self, learner: Learner, states: TrialStates, fit: Fit) -> None:
        """It has nothing to say here."""

    def objective(self, rows: Entering, labels: Sequence[Sequence[int]]) -> Objective:
        """See TrialKind."""
        return LabelledTokens(rows)

    def held_out(self, losses: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
        """See TrialKind."""
        return {
            "row_losses": losses.tolist(), "row_tokens": [int(n) for n in tokens],
            "adaptation": float(losses.sum() / tokens.sum()),
        }  # fmt: skip


class PairTrial:
    """The masked DPO loss (Eq. 14); of held-out pairs their DPO loss, margin and reward accuracy."""

    def __init__(self, beta: float, rows: TrialRows) -> None:
        self.beta, self.rows, self.knows_reference = beta, rows, False
        self._train = self._held_out = torch.zeros(0)

    def examples(self, rows: Sequences) -> int:
        """See TrialKind."""
        return len(rows) // 2

    def sequences(self, examples: Iterable[int], rows: Sequences) -> list[int]:
        """See TrialKind."""
        return [branch for row in examples for branch in (row, row + self.examples(rows))]

    def see_reference(self, model: Any, kernel: str, budget: int) -> None:
        """See TrialKind."""
        self._train = response_logps(model, self.rows.train, kernel, budget)
        self._held_out = response_logps(model, self.rows.held_out, kernel, budget)
        self.knows_reference = True

    def see_policy(self, learner: Learner, states: TrialStates, fit: Fit) -> None:
        """See TrialKind. From the same hidden states, so that the untouched model's margins are exactly 0."""
        sums = []
        for what in ("train", "held-out"):
            try:
                sums.append(held_out_losses(learner, learner.start(), states.entering(what), fit)[0])
            except NonFinite as error:
                name = states.sets[what].ids[error.row]
                raise RunFailed(
                    f"NaN or infinity in {error.where}, example {name}: check the model or its dtype"
                ) from error
        self._train, self._held_out = (-found for found in sums)
        self.knows_reference = True

    def objective(self, rows: Entering, labels: Sequence[Sequence[int]]) -> Objective:
        """See TrialKind. A margin is over all response tokens, whatever ``labels`` leave out."""
        whole = Sequences(rows.sequences.ids, rows.sequences.input_ids, self.rows.train.labels)
        return MaskedPairs(Entering(whole, rows.hidden), labels, self._train, self.beta)

    def held_out(self, losses: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
        """See TrialKind."""
        s = margins(losses, self._held_out, self.beta)
        found = pair_losses(s)
        return {
            "row_losses": found.tolist(), "row_tokens": [1] * len(found), "adaptation": float(found.mean()),
            "margin": float(s.mean()), "reward_accuracy": reward_accuracy(s),
        }  # fmt: skip

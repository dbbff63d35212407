"""Preference pairs in a trial: steps along the masked loss of Eq. 14, and margins of held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from alphatoken.pipeline.maths.batch import IGNORED, Batch, by_token_budget, collate
from alphatoken.pipeline.maths.learners import Learner
from alphatoken.pipeline.maths.preference import margin, masked_preference_loss, pair_weight
from alphatoken.pipeline.maths.trial import Entering, Fit, check


@dataclass(frozen=True, slots=True)
class MaskedPairs:
    """The Objective of preference data: the mean over a step's pairs of the masked loss (Eq. 14), omega held constant.

    ``branches``: all chosen branches, then all rejected ones, labelled at EVERY response token, which the margin sums over.
    ``kept``: per branch the labels that a mask leaves. ``reference``: (branches,) log-probabilities of whole responses under
    the reference, nats.
    """

    branches: Entering
    kept: Sequence[Sequence[int]]
    reference: torch.Tensor
    beta: float

    def __len__(self) -> int:
        return len(self.branches.sequences) // 2

    def groups(self, rows: Sequence[int], budget: int) -> list[list[int]]:
        """See Objective; both branches of a pair are in one pass."""
        ids, pairs = self.branches.sequences.input_ids, len(self)
        lengths = [2 * max(len(ids[row]), len(ids[row + pairs])) for row in rows]
        return [[rows[i] for i in group] for group in by_token_budget(lengths, budget)]

    def backward(self, learner: Learner, rows: Sequence[int], fit: Fit, where: str) -> tuple[int, int]:
        """See Objective."""
        branches = [*rows, *[row + len(self) for row in rows]]
        batch, from_below = self.branches.batch(branches, learner.scored)
        kept = collate([self.branches.sequences.input_ids[i] for i in branches], [self.kept[i] for i in branches])
        learned = (kept.labels != IGNORED).to(batch.labels.device)

        def weigh(losses: torch.Tensor) -> torch.Tensor:
            return self._slopes(losses, batch, learned, branches)

        with from_below:
            losses = learner.backward(batch, fit.kernel, weigh)
        check(losses, batch, branches, where)
        return len(rows), int(learned[:, 1:].sum())

    def _slopes(
        self, losses: torch.Tensor, batch: Batch, learned: torch.Tensor, branches: Sequence[int]
    ) -> torch.Tensor:
        """The derivative (n,) of the summed masked loss by every token's loss."""
        places, pairs = batch.predicting() + 1, len(branches) // 2
        logps = torch.zeros(batch.labels.numel(), dtype=torch.float64, device=losses.device)
        logps[places] = -losses.detach().double()
        logps = logps.view(batch.shape)
        theirs = self.reference[torch.tensor(branches)].to(logps)
        own = logps.sum(dim=1)
        omega = pair_weight(margin(own[:pairs], own[pairs:], theirs[:pairs], theirs[pairs:], self.beta), self.beta)
        with torch.enable_grad():
            logps.requires_grad_()
            loss = masked_preference_loss(logps[:pairs], learned[:pairs], logps[pairs:], learned[pairs:], omega)
            (slopes,) = torch.autograd.grad(loss.sum(), logps)
        return -slopes.flatten()[places].to(losses.dtype)


def margins(losses: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """s (pairs,) of pairs, see ``preference.margin``; ``losses``: the policy's summed cross-entropies of all chosen branches,
    then of all rejected ones, ``reference`` the reference's log-probabilities; (branches,) both, nats."""
    pairs = len(losses) // 2
    return margin(-losses[:pairs], -losses[pairs:], reference[:pairs], reference[pairs:], beta)


def pair_losses(s: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(s), (pairs,) nats: log 2 where the policy is the reference."""
    return softplus(-s)


def reward_accuracy(s: torch.Tensor) -> float:
    """The share of pairs with s above 0; those at 0 count half, so that an untouched model is at one half."""
    return float(((s > 0).double() + 0.5 * (s == 0).double()).mean())

"""Direct preference optimisation as the method sees it (Eq. 14): the margin s, its weight omega, the masked loss.

Plain functions of log-probabilities, for any trainer; torch alone. Log-probabilities are in nats.
"""

from __future__ import annotations

import torch


def margin(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """s = beta * [(log pi(y+|x) - log ref(y+|x)) - (log pi(y-|x) - log ref(y-|x))], ``(pairs,)``.

    Arguments ``(pairs,)``: log-probabilities of whole responses, summed over ALL response tokens, masked or not.
    Positive where the policy prefers the chosen response more than the reference does; 0 where they are the same model.
    """
    return beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))


def pair_weight(s: torch.Tensor, beta: float) -> torch.Tensor:
    """omega = beta * sigmoid(-s), ``(pairs,)``: what the DPO loss's gradient weighs a pair with; beta / 2 at s = 0.

    A number and not a part of the graph: the method holds it constant.
    """
    return beta * torch.sigmoid(-s.detach())


def masked_preference_loss(
    chosen_logps: torch.Tensor,
    chosen_kept: torch.Tensor,
    rejected_logps: torch.Tensor,
    rejected_kept: torch.Tensor,
    omega: torch.Tensor,
) -> torch.Tensor:
    """omega * (mean of kept chosen token losses - mean of kept rejected token losses), ``(pairs,)`` (Eq. 14).

    ``chosen_logps``, ``rejected_logps`` ``(pairs, length)``: the policy's log-probability of every token, with its
    graph; the two lengths may differ. ``chosen_kept``, ``rejected_kept``: of the same shapes, nonzero where the token
    is kept (``labels != -100`` in a mask's Parquet); numbers between 0 and 1 weigh the mean (``loss_weight``). Index i of
    both must speak of the same token. ``omega`` ``(pairs,)`` from ``pair_weight``. A token's loss is minus its
    log-probability. A branch without a kept token adds 0. The gradient at a masked token is exactly zero, whatever
    stands there.
    """
    return omega * (_mean_loss(chosen_logps, chosen_kept) - _mean_loss(rejected_logps, rejected_kept))


def _mean_loss(logps: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    weight = kept.to(logps.dtype)
    # Not a product alone: an infinity at a masked token would make it NaN.
    losses = torch.where(weight != 0, -logps, torch.zeros((), dtype=logps.dtype, device=logps.device))
    total = weight.sum(dim=-1)
    return (weight * losses).sum(dim=-1) / torch.where(total != 0, total, torch.ones_like(total))

"""Eq. 14 as plain functions: the margin, its weight, and the masked loss with its gradient."""

import math

import pytest
import torch

from alphatoken.pipeline.maths.preference import margin, masked_preference_loss, pair_weight

BETA = 0.1


def test_margin_and_weight_by_hand():
    s = margin(torch.tensor([-3.0]), torch.tensor([-9.0]), torch.tensor([-5.0]), torch.tensor([-4.0]), BETA)
    assert s.item() == pytest.approx(BETA * ((-3 + 5) - (-9 + 4)))
    assert pair_weight(s, BETA).item() == pytest.approx(BETA / (1 + math.exp(0.7)))


def test_the_weight_is_the_gradient_of_the_dpo_loss_and_carries_none():
    s = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    gain = s / BETA  # log-probability won
    loss = -torch.nn.functional.logsigmoid(BETA * gain).sum()
    (slope,) = torch.autograd.grad(loss, gain)
    omega = pair_weight(s, BETA)
    torch.testing.assert_close(omega, -slope)
    assert omega[1] == BETA / 2 and not omega.requires_grad


def logps(pairs: int, length: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(pairs, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (-drawn.square()).requires_grad_(True)


def test_masked_loss_and_its_gradient_against_a_loop():
    chosen, rejected = logps(3, 7, 1), logps(3, 5, 2)
    kept = torch.rand(3, 7, generator=torch.Generator().manual_seed(3)) > 0.5
    other = torch.rand(3, 5, generator=torch.Generator().manual_seed(4)) > 0.5
    omega = torch.tensor([0.02, 0.05, 0.09], dtype=torch.float64)
    found = masked_preference_loss(chosen, kept, rejected, other, omega)
    found.sum().backward()
    for pair in range(3):
        sides = []
        for values, mask in ((chosen, kept), (rejected, other)):
            losses = [-values[pair, t].item() for t in range(values.shape[1]) if mask[pair, t]]
            sides.append(sum(losses) / len(losses))
            for t in range(values.shape[1]):
                sign = -1 if values is chosen else 1
                expected = sign * omega[pair].item() / len(losses) if mask[pair, t] else 0.0
                assert values.grad[pair, t].item() == pytest.approx(expected, rel=1e-12, abs=0.0)
        assert found[pair].item() == pytest.approx(omega[pair].item() * (sides[0] - sides[1]), rel=1e-12)


def test_the_gradient_at_masked_tokens_is_exactly_zero_whatever_stands_there():
    chosen = torch.tensor([[-1.0, -math.inf, -2.0]], requires_grad=True)
    rejected = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    kept, other = torch.tensor([[1, 0, 1]]), torch.tensor([[0, 0]])
    loss = masked_preference_loss(chosen, kept, rejected, other, torch.tensor([0.5]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.75)
    assert chosen.grad[0, 1] == 0 and not rejected.grad.any()

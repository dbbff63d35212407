"""Preconditioned directions against the dense curvature, built from every position's own outer products."""

from __future__ import annotations

import pytest
import torch

from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.kronecker import KroneckerFactors, adam, kfac
from alphatoken.pipeline.maths.linear_maps import LinearMap
from alphatoken.pipeline.maths.outer_sums import OuterSum
from benchmarks.models.small import build, model_types
from tests.maths.comparison import sequences
from tests.maths.tiny_models import model_of


def recorded(family: str):
    """The factors of one batch, and (h, d) of every map at the predicting positions as a plain hook sees them."""
    model = model_of(family, seed=1)
    scored = scored_layers(model, 1)
    batch = sequences([9, 12], 3).batch()
    factors = KroneckerFactors(scored)
    factors.positions = batch.predicting()
    ghost_pass(scored, batch, factors)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(captured) -> None:
        rows = torch.arange(len(captured.entering)) if captured.rows is None else captured.rows
        inside = torch.isin(rows, factors.positions)
        key = f"{captured.map.name}/{captured.expert}"
        seen[key] = (captured.entering[inside], captured.error[inside])

    ghost_pass(scored, batch, keep)
    return scored, factors, seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kfac_solves_the_dense_damped_system(family: str) -> None:
    scored, factors, seen = recorded(family)
    generator = torch.Generator().manual_seed(0)
    for linear in scored.maps:
        entering, error = seen[f"{linear.name}/0"]
        a, b = entering.T @ entering / len(entering), error.T @ error / len(error)
        dense = torch.kron(b, a)  # on the row-major vector of a (d_out, d_in) matrix
        damped = dense + 0.1 * dense.trace() / len(dense) * torch.eye(len(dense), dtype=dense.dtype)
        direction = torch.randn(linear.parameter.shape, generator=generator, dtype=torch.float64)
        matrix = direction.T if linear.transposed else direction
        wanted = torch.linalg.solve(damped, matrix.flatten()).unflatten(0, matrix.shape)
        found = kfac(direction, factors.total, linear, 0.1).double()
        assert found.shape == direction.shape
        torch.testing.assert_close(found.T if linear.transposed else found, wanted, rtol=1e-5, atol=1e-5)


def test_every_expert_has_factors_of_its_own() -> None:
    scored, factors, seen = recorded("mixtral")
    stacked = [linear for linear in scored.maps if linear.experts]
    assert stacked
    for linear in stacked:
        counted = 0
        for expert in range(linear.experts):
            key = f"{linear.name}/{expert}"
            entering, error = seen.get(key, (torch.zeros(0), torch.zeros(0)))
            counted += len(entering)
            assert int(factors.total[f"n/{linear.name}"][expert]) == len(entering)
            if len(entering):
                torch.testing.assert_close(factors.total[f"A/{linear.name}"][expert], entering.T @ entering)
                torch.testing.assert_close(factors.total[f"B/{linear.name}"][expert], error.T @ error)
        assert counted == 2 * len(factors.positions)  # two experts per token
        found = kfac(torch.ones(linear.parameter.shape), factors.total, linear, 0.1)
        assert found.shape == linear.parameter.shape and bool(torch.isfinite(found).all())


def test_large_damping_leaves_the_direction_and_small_damping_whitens() -> None:
    """With A = diag(1, 4), B = (1): M / (a + c)."""
    linear = LinearMap("w", 0, torch.nn.Linear(2, 1, bias=False))
    factors = {"A/w": torch.diag(torch.tensor([1.0, 4.0])) * 3, "B/w": torch.ones(1, 1) * 3, "n/w": torch.tensor(3.0)}
    found = kfac(torch.tensor([[1.0, 1.0]]), factors, linear, 1e-9)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.25]]))
    found = kfac(torch.tensor([[1.0, 1.0]]), factors, linear, 1e6)
    assert float(found[0, 0] / found[0, 1]) == pytest.approx(1.0, abs=1e-4)


def test_adam_divides_by_the_root_of_the_second_moment() -> None:
    found = adam(torch.tensor([2.0, -2.0, 0.0]), torch.tensor([1.0, 9.0, 4.0]), 0.5)
    torch.testing.assert_close(found, torch.tensor([2.0 / 2.0, -2.0 / 4.0, 0.0]))  # mean root 2, damped by 1


def test_weights_that_do_not_enter_the_loss_have_a_direction_of_zeros() -> None:
    """The indexer of sparse attention chooses what is seen, and no error comes back through a choice."""
    model = build(next(kind for kind in model_types() if kind.name == "deepseek_v32"))
    scored, batch = scored_layers(model, 1), sequences([9, 12], 3, vocabulary=30).batch()
    factors, fisher, gradient = KroneckerFactors(scored), OuterSum(scored, squared=True), OuterSum(scored)
    for visitor in (factors, fisher, gradient):
        ghost_pass(scored, batch, visitor)
    outside = [linear for linear in scored.maps if not gradient.total[linear.name].any()]
    assert 0 < len(outside) < len(scored.maps)
    for linear in scored.maps:
        slope = gradient.total[linear.name]
        for found in (adam(slope, fisher.total[linear.name], 0.1), kfac(slope, factors.total, linear, 0.1)):
            assert bool(torch.isfinite(found).all()) and bool(found.any()) == (linear not in outside)

"""The column gradient_norm: by position, against plain autograd with a weight of its own at every position."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alphatoken.pipeline.maths import contraction
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.masking import score_of, stability_of, token_values
from alphatoken.pipeline.maths.valuer import TokenValuer
from tests.maths import pairwise
from tests.maths.comparison import Sequences, sequences, the_same_twice
from tests.maths.tiny_models import FAMILIES, LLAMA, model_of

LAYERS, WINDOW = 2, 6
TRAIN = sequences([15, 6, 11, 4], 3)


def valuer(model: nn.Module) -> TokenValuer:
    """It looks at no direction."""
    return TokenValuer(model, None, LAYERS, WINDOW, scores=["gradient_norm"])


class PerPosition(nn.Module):
    """A linear map whose weight is another tensor (of equal numbers) at each position: y_p = W_p x_p."""

    def __init__(self, linear: nn.Linear, length: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(linear.weight.detach().repeat(length, 1, 1))

    def forward(self, entering: torch.Tensor) -> torch.Tensor:
        return torch.einsum("poi,bpi->bpo", self.weights, entering)


def autograd_norms(model: nn.Module, ids: list[int], labels: list[int]) -> torch.Tensor:
    """(length,) norms over the scored maps of dL/dW_p, no hook anywhere, at the index of the predicted token."""
    twin = copy.deepcopy(model)
    maps = []
    for layer in range(3 - LAYERS, 3):
        for name in LLAMA.linears:
            path = f"{LLAMA.layers}.{layer}.{name}"
            maps.append(PerPosition(twin.get_submodule(path), len(ids)))
            twin.set_submodule(path, maps[-1])
    logits = twin(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    targets = torch.tensor(labels)
    F.cross_entropy(logits[:-1], targets[1:], reduction="sum", ignore_index=-100).backward()
    squares = sum(one.weights.grad.square().sum(dim=(1, 2)) for one in maps)
    found = torch.zeros(len(ids), dtype=torch.float64)
    found[1:] = squares[:-1].sqrt() * (targets[1:] != -100)
    return found


def test_it_is_the_norm_of_what_the_position_adds_to_the_gradient() -> None:
    model = model_of("llama", seed=1)
    found = valuer(model).value(TRAIN.batch())["gradient_norm"]
    for row, (ids, labels) in enumerate(zip(TRAIN.ids, TRAIN.labels, strict=True)):
        wanted = autograd_norms(model, ids, labels)
        assert bool((wanted[torch.tensor(labels) != -100] > 0).all())
        torch.testing.assert_close(found[row, : len(ids)], wanted, rtol=1e-9, atol=1e-12)
        assert not found[row, len(ids) :].any()


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
def test_every_map_and_every_chosen_expert_counts_once(family: str) -> None:
    """Transposed maps and experts, against sums of squares over hooks that the engine does not use."""
    model, layout = model_of(family, seed=1), FAMILIES[family].layout
    found, twin = valuer(model).value(TRAIN.batch())["gradient_norm"], pairwise.oracle(model)
    for row, (ids, labels) in enumerate(zip(TRAIN.ids, TRAIN.labels, strict=True)):
        recorded = pairwise.record(twin, layout, LAYERS, ids, labels)
        for p in recorded.losses:
            squares = sum(float(d[p] @ d[p]) * float(h[p] @ h[p]) for h, d in recorded.seen.values())
            assert float(found[row, p + 1]) == pytest.approx(squares**0.5, rel=1e-9)


def test_it_bounds_the_direct_value_and_knows_no_causal_path() -> None:
    model, batch = model_of("llama", seed=1), TRAIN.batch()
    some = {name: torch.ones_like(weight) for name, weight in scored_layers(model, LAYERS).weights().items()}
    found = TokenValuer(model, the_same_twice(some), LAYERS, WINDOW).value(batch)
    length = sum(float(m.square().sum()) for m in some.values()) ** 0.5
    assert bool((found["adaptation_direct"].abs() <= found["gradient_norm"] * length * (1 + 1e-9)).all())
    for window in (0, WINDOW):
        own = TokenValuer(model, the_same_twice(some), LAYERS, window, scores=["paper", "gradient_norm"])
        torch.testing.assert_close(own.value(batch)["gradient_norm"], found["gradient_norm"], rtol=1e-12, atol=0)


def test_it_depends_neither_on_the_workspace_nor_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", seed=1)
    whole = valuer(model).value(TRAIN.batch())["gradient_norm"]
    monkeypatch.setattr(contraction, "WORKSPACE_ELEMENTS", 100)
    torch.testing.assert_close(valuer(model).value(TRAIN.batch())["gradient_norm"], whole, rtol=1e-12, atol=0)
    alone = Sequences(TRAIN.ids[1:2], TRAIN.labels[1:2]).batch()
    torch.testing.assert_close(valuer(model).value(alone)["gradient_norm"][0], whole[1, :6], rtol=1e-9, atol=1e-12)


def test_gradients_whose_square_is_no_float32_have_a_norm() -> None:
    model = model_of("llama", seed=1, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-15)  # type: ignore[operator]
    found = valuer(model).value(TRAIN.batch())["gradient_norm"]
    response = TRAIN.batch().labels != -100
    assert bool((found[response] > 0).all()) and float(found.max()) < 1e-10


def test_values_per_unit_of_gradient_norm_leave_the_loss_alone_and_are_zero_without_a_gradient() -> None:
    columns = {
        "adaptation_direct": np.array([2.0, 1.0, 0.0, 3.0], np.float32),
        "adaptation_causal": np.array([2.0, 0.0, 0.0, 1.0], np.float32),
        "stability_direct": np.array([1.0, 1.0, 0.0, 1.0], np.float32),
        "stability_causal": np.zeros(4, np.float32),
        "loss": np.array([1.0, 2.0, 3.0, 4.0], np.float32),
        "gradient_norm": np.array([2.0, 0.5, 0.0, 0.0], np.float32),
    }
    assert score_of(columns, "paper", per_norm=True).tolist() == [2.0, 2.0, 0.0, 0.0]
    assert stability_of(columns, "paper", per_norm=True).tolist() == [0.5, 2.0, 0.0, 0.0]
    scales = {"score": 2.0, "stability": 1.0, "loss": 4.0}
    found = token_values(columns, "paper", 3.0, scales, loss_weight=2.0, per_norm=True)
    assert found.tolist() == [1.0 + 1.5 - 0.5, 1.0 + 6.0 - 1.0, -1.5, -2.0]

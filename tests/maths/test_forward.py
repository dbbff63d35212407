"""Losses without gradients, and entropy and loss of the head, against log_softmax over the whole logits in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from alphatoken.pipeline.maths import head
from alphatoken.pipeline.maths.batch import IGNORED
from alphatoken.pipeline.maths.decoder import UnsupportedModel, scored_layers
from alphatoken.pipeline.maths.forward import token_losses_of
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.valuer import TokenValuer
from tests.maths.comparison import Sequences, sequences, the_same_twice
from tests.maths.tiny_models import FAMILIES, model_of

FORWARD = ("loss", "entropy")


def rows() -> Sequences:
    """Unequal lengths, a second turn, and an example without a response."""
    some = sequences((5, 19, 12), 3)
    return Sequences([*some.ids, [7]], [*some.labels, [IGNORED]])


def definition(model: Any, ids: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
    """Loss and entropy of every response token of one example, from the whole logits."""
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    out = {name: torch.zeros(len(ids), dtype=torch.float64) for name in FORWARD}
    for t in range(1, len(ids)):
        if labels[t] != IGNORED:
            out["loss"][t] = -log_p[t - 1, ids[t]]
            finite = log_p[t - 1][log_p[t - 1] > -math.inf]
            out["entropy"][t] = -(finite.exp() * finite).sum()
    return out


def assert_defined(found: dict[str, torch.Tensor], model: nn.Module, some: Sequences, relative: float) -> None:
    for row, (ids, labels) in enumerate(zip(some.ids, some.labels, strict=True)):
        for name, wanted in definition(model, ids, labels).items():
            column = found[name][row].double()
            torch.testing.assert_close(
                column[: len(ids)], wanted, rtol=relative, atol=relative, msg=lambda m, name=name: f"{name}: {m}"
            )
            assert not column[len(ids) :].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_entropies_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)  # several chunks of 16 rows
    model, some = model_of(family, seed=1), rows()
    found = TokenValuer(model, None, scores=FORWARD).value(some.batch())
    assert tuple(found) == FORWARD and all(column.dtype == torch.float64 for column in found.values())
    narrow = ("deepseek_v3", "gemma2")  # a router, and the model's own softmax of attention, in float32 in any case
    assert_defined(found, model, some, 1e-6 if family in narrow else 1e-9)
    losses = token_losses_of(model, some.batch(), "sdpa")
    assert losses.dtype == torch.float32 and losses.shape == some.batch().shape
    torch.testing.assert_close(losses, found["loss"].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_narrow_models_they_are_summed_in_float32(dtype: torch.dtype) -> None:
    """From the model's own logits, whose rounding in bfloat16 is the model's."""
    model: Any = model_of("llama", seed=1, dtype=dtype)
    some = rows()
    found = TokenValuer(model, None, scores=FORWARD).value(some.batch())
    assert all(column.dtype == torch.float32 for column in found.values())
    assert_defined(found, model, some, 1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_entropy_is_between_nothing_and_the_logarithm_of_the_vocabulary(scale: float) -> None:
    model: Any = model_of("llama", seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    some = rows().batch()
    found = TokenValuer(model, None, scores=["entropy"]).value(some)["entropy"][some.labels != IGNORED]
    most = math.log(61)
    if scale == 1.0:
        assert bool((found > 0).all()) and bool((found < most).all())
    else:
        torch.testing.assert_close(found, torch.full_like(found, 0.0 if scale else most), rtol=1e-12, atol=1e-9)


ALLOWED = 55  # ids of the data are below


class _Forbidding(nn.Module):
    """A head that rules tokens out: logits of minus infinity."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ self.weight.T
        ruled_out = torch.arange(logits.shape[-1]) >= ALLOWED
        return logits.masked_fill(ruled_out, -math.inf)


def test_a_logit_of_minus_infinity_adds_nothing() -> None:
    """Every column is that of a model whose vocabulary ends before."""
    some = sequences((5, 19, 12), 3, vocabulary=ALLOWED)
    forbidding: Any = model_of("llama", seed=1)
    forbidding.lm_head = _Forbidding(forbidding.lm_head)
    smaller: Any = model_of("llama", seed=1)
    smaller.lm_head.weight = nn.Parameter(smaller.lm_head.weight[:ALLOWED].detach().clone())
    generator = torch.Generator().manual_seed(0)
    weights = scored_layers(smaller, 2).weights()
    direction = {n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in weights.items()}
    found, wanted = (
        TokenValuer(model, the_same_twice(direction), 2, 6, exact=True).value(some.batch())
        for model in (forbidding, smaller)
    )
    for name, column in wanted.items():
        assert column.any()
        close = 1e-9 * float(column.abs().max())
        torch.testing.assert_close(found[name], column, rtol=1e-9, atol=close, msg=lambda m, name=name: f"{name}: {m}")
    assert_defined({name: found[name] for name in FORWARD}, forbidding, some, 1e-9)


# --- models whose layers cannot be scored ----------------------------------------------------------------------------


def _quantised() -> nn.Module:
    """No matrix of the last layer is one that can be multiplied with."""
    model: Any = model_of("llama", seed=1)
    for module in model.model.layers[2].modules():
        if isinstance(module, nn.Linear):
            module.__class__ = _Disguised
    return model


class _Disguised(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


def test_scores_that_look_at_no_layer_work_where_layers_cannot_be_scored() -> None:
    model, some = _quantised(), rows()
    with pytest.raises(UnsupportedModel, match="none of the 7 matrices"):
        TokenValuer(model, None, 1, scores=["gradient_norm"]).value(some.batch())
    assert_defined(TokenValuer(model, None, 1, scores=FORWARD).value(some.batch()), model, some, 1e-6)
    torch.testing.assert_close(
        token_losses_of(model, some.batch(), "sdpa"),
        TokenValuer(model, None, scores=["loss"]).value(some.batch())["loss"].float(),
    )


def test_more_layers_than_there_are_do_not_matter_to_what_is_read_off_the_softmax() -> None:
    model, some = model_of("llama", seed=1), rows()
    assert_defined(TokenValuer(model, None, layers=99, scores=FORWARD).value(some.batch()), model, some, 1e-9)


@pytest.mark.parametrize(
    ("scores", "exact"), [(("paper",), False), (("loss", "information"), False), ((), True), (("loss",), True)]
)
def test_without_directions_what_looks_at_them_is_refused(scores: tuple[str, ...], exact: bool) -> None:
    with pytest.raises(ValueError, match="need directions: Directions.load"):
        TokenValuer(model_of("llama"), None, 2, scores=scores, exact=exact)


# --- NaN and infinity ------------------------------------------------------------------------------------------------


def test_a_broken_model_is_named_with_example_and_module() -> None:
    model: Any = model_of("llama", seed=1, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    for look in (TokenValuer(model, None, scores=["entropy"]).value, lambda b: token_losses_of(model, b, "sdpa")):
        with pytest.raises(NonFinite, match="layers.1.mlp.down_proj") as error:
            look(rows().batch())
        assert error.value.row == 0


def test_a_target_that_cannot_follow_is_named_as_a_loss() -> None:
    """No module shows it where the model itself rules tokens out after its head."""
    model: Any = model_of("llama", seed=1)
    some, original = rows(), model.forward
    ruled_out = some.ids[1][-1]
    assert ruled_out not in some.ids[0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        found.logits = found.logits.masked_fill(torch.arange(61) == ruled_out, -math.inf)
        return found

    model.forward = forward
    with pytest.raises(NonFinite, match="the loss of example 1"):
        TokenValuer(model, None, scores=["loss"]).value(some.batch())
    with pytest.raises(NonFinite, match="the loss"):
        token_losses_of(model, some.batch(), "sdpa")

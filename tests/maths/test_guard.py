"""The guard: a model that does something else under the engine, or that looks ahead, is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alphatoken.pipeline.maths import guard
from alphatoken.pipeline.maths.attention import KERNELS, intercepted
from alphatoken.pipeline.maths.decoder import UnsupportedModel, no_scored_layers, scored_layers
from alphatoken.pipeline.maths.guard import Guard
from alphatoken.pipeline.maths.valuer import TokenValuer
from benchmarks.models.weights import randomised
from tests.maths.tiny_models import COMMON, FAMILIES, model_of

ROWS = [[3, 4, 5], [7, 8, 9, 10, 2, 3], list(range(3, 40))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_runs_what_the_model_runs(family: str, dtype: torch.dtype) -> None:
    found = Guard(scored_layers(model_of(family, 1, dtype), 2), "sdpa", 6)(ROWS)
    assert (found.rows, found.longest) == (4, 37)  # the shortest alone, it and the middle one in a batch, the longest
    assert found.hidden < guard.ROUNDING[dtype]


class _IgnoresItsMask(nn.Module):
    """An attention module that, where the function it finds is not transformers' own, lets every token see all."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.inner = attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
            length = kwargs["hidden_states"].shape[1]
            kwargs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool)
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_planted_wrong_attention_is_refused_by_its_layer(layer: int) -> None:
    model: Any = model_of("llama", 1, torch.float32)
    model.model.layers[layer].self_attn = _IgnoresItsMask(model.model.layers[layer].self_attn)
    with pytest.raises(UnsupportedModel, match=rf"not the model's own on a row of 3 .*first at model.layers.{layer};"):
        Guard(scored_layers(model, 2), "sdpa", 6)(ROWS)
    with pytest.raises(UnsupportedModel, match="not the model's own"):
        Guard(no_scored_layers(model), "sdpa", 0)(ROWS)


class _AddsWhatIsFarAway(nn.Module):
    """Right on short rows: under the engine, tokens beyond the twentieth get something else."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = self.inner(hidden)
        if hidden.shape[1] > 20 and ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
            found = torch.cat([found[:, :20], found[:, 20:] * 1.5], dim=1)
        return found


def test_what_shows_on_long_rows_alone_is_found_when_they_come() -> None:
    model: Any = model_of("llama", 1, torch.float32)
    model.model.layers[2].mlp = _AddsWhatIsFarAway(model.model.layers[2].mlp)
    check = Guard(scored_layers(model, 1), "sdpa", 6)
    assert check(ROWS[:2]).longest == 6
    seen: list[int] = []
    compared = check._compared
    check._compared = lambda rows: seen.append(len(rows[0])) or compared(rows)  # type: ignore[method-assign, func-returns-value]
    assert check([[1, 2, 3], [5, 6, 7, 8, 9, 1]]).longest == 6 and not seen
    with pytest.raises(UnsupportedModel, match=r"row of 37 tokens \(first at model.layers.2;"):
        check(ROWS)
    assert seen == [37]


def test_a_model_that_looks_ahead_is_refused() -> None:
    config = hf.BertConfig(**{**COMMON, "num_hidden_layers": 2})
    model = randomised(hf.BertLMHeadModel(config), 1).float()
    with pytest.raises(UnsupportedModel, match="BertLMHeadModel is not causal.*is_decoder=true"):
        Guard(scored_layers(model, 1), "sdpa", 0)(ROWS)
    decoder = randomised(hf.BertLMHeadModel(hf.BertConfig(**COMMON, is_decoder=True)), 1).float()
    assert Guard(scored_layers(decoder, 1), "sdpa", 0)(ROWS).rows == 4


def test_numbers_that_are_not_finite_are_left_to_where_an_example_can_be_named() -> None:
    model: Any = model_of("llama", 1, torch.float32)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    assert Guard(scored_layers(model, 2), "sdpa", 6)(ROWS).rows == 0


def test_an_unknown_keyword_of_attention_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the function that the model would call heeds it."""
    model: Any = model_of("gemma2", 1)  # eager
    forward = type(model.model.layers[2].self_attn).forward
    monkeypatch.setattr(
        type(model.model.layers[2].self_attn),
        "forward",
        lambda self, *args, **kwargs: forward(self, *args, **kwargs, gate=torch.ones(1)),
    )
    scored = scored_layers(model, 1)
    assert Guard(scored, "sdpa", 6)(ROWS).rows == 4
    own = hf.models.gemma2.modeling_gemma2.eager_attention_forward

    def heeding(*args: Any, gate: Any = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    monkeypatch.setattr(hf.models.gemma2.modeling_gemma2, "eager_attention_forward", heeding)
    with pytest.raises(UnsupportedModel, match="hands gate to its attention, which the engine does not know"):
        Guard(scored, "sdpa", 6)(ROWS)


@pytest.mark.parametrize("attention", ["flex_attention", "paged|eager", "kernels-community/flash-attn"])
def test_attention_is_one_that_the_engine_supports(attention: str) -> None:
    with pytest.raises(ValueError, match=r"attention=.*: must be one of sdpa, flash_attention_2, eager"):
        TokenValuer(model_of("llama"), None, 2, attention=attention, scores=["loss"])


def test_attention_is_as_before_after_the_block() -> None:
    model: Any = model_of("llama")
    before = {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in KERNELS}
    with (
        pytest.raises(KeyboardInterrupt),
        intercepted(model.model, "sdpa", None),
        intercepted(model.model, "eager", None),
    ):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before["sdpa"]
        raise KeyboardInterrupt
    assert {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in KERNELS} == before
    assert model.config._attn_implementation == "sdpa"

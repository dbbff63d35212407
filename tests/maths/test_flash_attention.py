"""model.attention=flash_attention_2, with a stand-in for the flash_attn package under which transformers itself runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import modeling_flash_attention_utils as flash_utils

from alphatoken.pipeline.maths.decoder import UnsupportedModel, scored_layers
from alphatoken.pipeline.maths.guard import Guard
from alphatoken.pipeline.maths.valuer import TokenValuer
from tests.maths.comparison import directions, sequences
from tests.maths.tiny_models import model_of, nearby

LAYERS, WINDOW = 2, 6
calls: list[tuple[int, int]] = []


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
) -> torch.Tensor:  # fmt: skip
    """As flash_attn's, (batch, length, heads, size), by torch's own kernel."""
    calls.append(window_size)
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=softmax_scale).transpose(1, 2)


def _unused(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("no mask is given: padding stands on the right")


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    package.flash_attn_varlen_func = flash_attn_func  # type: ignore[attr-defined]  # its parameters are looked at
    for module, name in [
        (package, "flash_attn_with_kvcache"), (padding, "pad_input"),
        (padding, "unpad_input"),
    ]:  # fmt: skip
        setattr(module, name, _unused)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    there = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    for check in ("general_availability_check", "pkg_availability_check"):
        monkeypatch.setitem(there, check, lambda *args, **kwargs: True)
    monkeypatch.setitem(there, "supported_devices", ((lambda: True, "cpu"),))
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    calls.clear()
    yield


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_values_are_those_of_the_other_kernels(family: str) -> None:
    policy: Any = model_of(family, seed=1)
    train, validation, completions = sequences([13, 6, 10], 3), [sequences([9, 7], 4)], sequences([8, 11], 5)
    made = directions(policy, nearby(policy, seed=2), LAYERS, validation, completions)
    wanted = TokenValuer(policy, made, LAYERS, WINDOW, "sdpa").value(train.batch())
    ids = torch.tensor([train.ids[0]])
    plain = policy(input_ids=ids).logits
    assert not calls
    policy.set_attn_implementation("flash_attention_2")  # transformers itself, without the engine
    torch.testing.assert_close(policy(input_ids=ids).logits, plain)
    assert len(calls) == 3 and (calls[0] == (-1, -1)) == (family != "mistral")
    policy.set_attn_implementation("sdpa")
    calls.clear()
    found = TokenValuer(policy, made, LAYERS, WINDOW, "flash_attention_2").value(train.batch())
    assert calls and policy.config._attn_implementation == "sdpa"
    for name, column in wanted.items():
        torch.testing.assert_close(found[name], column, rtol=1e-9, atol=1e-9 * float(column.abs().max()))
    assert Guard(scored_layers(policy, LAYERS), "flash_attention_2", WINDOW)(train.ids).hidden < 1e-9


def test_where_it_is_not_installed_it_is_refused_with_the_key_to_set() -> None:
    policy = model_of("llama", seed=1)
    with pytest.raises(UnsupportedModel, match=r"attention=flash_attention_2 cannot be used: .*model.attention=sdpa"):
        TokenValuer(policy, None, LAYERS, attention="flash_attention_2", scores=["loss"]).value(
            sequences([5], 1).batch()
        )


def test_a_model_without_it_is_refused_with_the_key_to_set() -> None:
    policy: Any = model_of("gpt_neox", seed=1)
    type(policy.gpt_neox)._supports_flash_attn, before = False, type(policy.gpt_neox)._supports_flash_attn
    try:
        with pytest.raises(UnsupportedModel, match="attention=flash_attention_2 cannot be used"):
            TokenValuer(policy, None, LAYERS, attention="flash_attention_2", scores=["loss"]).value(
                sequences([5], 1).batch()
            )
    finally:
        type(policy.gpt_neox)._supports_flash_attn = before

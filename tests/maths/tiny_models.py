"""Tiny random models of every architecture that is tested, with the layout that the oracle knows them by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

from benchmarks.models.weights import randomised
from tests.maths.pairwise import Layout, gpt_oss_gate, silu_gate

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
COMMON: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = Layout("model.layers", ATTENTION + MLP, "self_attn.v_proj")


@dataclass(frozen=True)
class Family:
    """An architecture: how to build a tiny model, and where its parts are."""

    build: Callable[[], nn.Module]
    layout: Layout


def _of(model: str, config: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**(COMMON | changes)))


def _neox_values(config: Any) -> list[int]:
    size = config.hidden_size // config.num_attention_heads
    return [(3 * head + 2) * size + i for head in range(config.num_attention_heads) for i in range(size)]


def _phi3_values(config: Any) -> list[int]:
    size = config.hidden_size // config.num_attention_heads
    first = (config.num_attention_heads + config.num_key_value_heads) * size
    return list(range(first, first + config.num_key_value_heads * size))


def _latent_values(config: Any) -> list[int]:
    nope, size = config.qk_nope_head_dim, config.v_head_dim
    return [h * (nope + size) + nope + i for h in range(config.num_attention_heads) for i in range(size)]


SLIDING = ["full_attention", "sliding_attention", "full_attention"]
EXPERTS = {"num_experts_per_tok": 2}
FAMILIES: dict[str, Family] = {
    "llama": Family(_of("LlamaForCausalLM", "LlamaConfig"), LLAMA),
    "qwen2": Family(_of("Qwen2ForCausalLM", "Qwen2Config"), LLAMA),
    "qwen3": Family(_of("Qwen3ForCausalLM", "Qwen3Config", head_dim=10), LLAMA),
    "mistral": Family(_of("MistralForCausalLM", "MistralConfig", sliding_window=5), LLAMA),
    "phi3": Family(
        _of("Phi3ForCausalLM", "Phi3Config", sliding_window=None),
        Layout(
            "model.layers", ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
            "self_attn.qkv_proj", _phi3_values,
        ),
    ),
    "gemma2": Family(
        _of(
            "Gemma2ForCausalLM", "Gemma2Config", head_dim=10, query_pre_attn_scalar=10, sliding_window=5,
            attn_logit_softcapping=1.5, final_logit_softcapping=2.5,
        ),
        LLAMA,
    ),
    "gemma3": Family(
        _of(
            "Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=10, query_pre_attn_scalar=10, sliding_window=5,
            layer_types=SLIDING,
        ),
        LLAMA,
    ),
    "gpt2": Family(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=61, n_embd=24, n_head=4, n_layer=3, n_positions=64, bos_token_id=1, eos_token_id=2,
            )
        ),
        Layout(
            "transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), "attn.c_attn",
            lambda config: list(range(2 * config.n_embd, 3 * config.n_embd)), transposed=True,
        ),
    ),
    "gpt_neox": Family(
        _of("GPTNeoXForCausalLM", "GPTNeoXConfig"),
        Layout(
            "gpt_neox.layers",
            ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            "attention.query_key_value", _neox_values,
        ),
    ),
    "olmo2": Family(_of("Olmo2ForCausalLM", "Olmo2Config"), LLAMA),
    "mixtral": Family(
        _of("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, sliding_window=None, **EXPERTS),
        Layout(
            "model.layers", ATTENTION, "self_attn.v_proj", experts="mlp.experts", gate=silu_gate, routers=("mlp.gate",)
        ),
    ),
    "qwen3_moe": Family(
        _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, moe_intermediate_size=12, head_dim=10, **EXPERTS),
        Layout(
            "model.layers", ATTENTION, "self_attn.v_proj", experts="mlp.experts", gate=silu_gate, routers=("mlp.gate",)
        ),
    ),
    "gpt_oss": Family(
        _of(
            "GptOssForCausalLM", "GptOssConfig", num_local_experts=4, head_dim=10, sliding_window=5,
            layer_types=SLIDING, **EXPERTS,
        ),
        Layout(
            "model.layers", ATTENTION, "self_attn.v_proj", experts="mlp.experts", gate=gpt_oss_gate,
            experts_transposed=True, experts_bias=True, routers=("mlp.router",),
        ),
    ),
    "deepseek_v3": Family(
        _of(
            "DeepseekV3ForCausalLM", "DeepseekV3Config", num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10,
            qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, n_routed_experts=4, n_group=1, topk_group=1,
            moe_intermediate_size=12, n_shared_experts=1, first_k_dense_replace=1, **EXPERTS,
        ),
        Layout(
            "model.layers",
            (
                "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj",
                "self_attn.o_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj",
                "mlp.shared_experts.down_proj",
            ),
            "self_attn.kv_b_proj", _latent_values, experts="mlp.experts", gate=silu_gate, routers=("mlp.gate",),
        ),
    ),
}  # fmt: skip


def model_of(family: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny random model of a family."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # some gains and sinks start at random
        model: Any = randomised(FAMILIES[family].build(), seed).to(dtype)
    if dtype != torch.float32 and FAMILIES[family].layout.experts is not None:
        model.set_experts_implementation("eager")  # grouped_mm, the default, knows no float64 and no tiny bfloat16
    return model


def nearby(model: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    """A copy with every parameter moved a little: the reference of a drift."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return twin

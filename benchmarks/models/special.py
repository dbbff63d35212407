"""What a type needs beyond the general rule: field -> value, by model type.

Three reasons: a field without a usual value that the model cannot do without, sizes that must fit each other, and what
makes a part matter (shared keys and values, sparse budgets).
"""

from __future__ import annotations

from typing import Any


class Nested(dict):
    """Changes of a configuration that is held by another; with its ``model_type`` where the usual one cannot be asked."""


_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_SECTIONED = {"text_config": Nested(rope_parameters=_SECTIONS)}
_SLIDING = ["sliding_attention", "full_attention"] * 2
_SHARED = {"layer_types": _SLIDING, "num_kv_shared_layers": 1}
_INDEXER = {
    "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
}  # fmt: skip
_VOCABULARY = {f"<|extra_{number}|>": 90 for number in (200, 201)} | {"<image>": 85}
_BY_KIND = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}

_NARROW = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 12, "swa_kv_lora_rank": 8,
    "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
_BLOCKS = {"layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]}

SPECIAL: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 10, "audio_token_offset": 74, "text_config": Nested(vocab_size=199)},
    "bamba": {"attn_layer_indices": [2]},
    "chameleon": {"vocabulary_map": _VOCABULARY},
    "cohere_compass": {"text_config": Nested(rope_parameters=_BY_KIND)},
    "cohere_compass_text": {"rope_parameters": _BY_KIND},
    "cosmos3_edge": _SECTIONED,
    "dbrx": {"attn_config": Nested(rope_theta=10000.0, clip_qkv=8.0)},
    "deepseek_ocr2": {"text_config": Nested(mlp_layer_types=["dense"] + ["sparse"] * 3, num_experts_per_tok=2)},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}, "index_topk": 3,
    },
    "diffusion_gemma": {"text_config": Nested(num_experts=4, top_k_experts=2, moe_intermediate_size=24)},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": Nested(_NARROW), "vision_config": Nested(mlp_layer_types=["dense"] * 4, per_layer_config={}),
    },
    "dots3_note_text": _NARROW,
    "emu3": {"vocabulary_map": _VOCABULARY},
    "ernie4_5_vl_moe": {"text_config": Nested(rope_parameters=_SECTIONS | {"mrope_section": [1, 1, 2]})},
    "gemma3n_text": {**_SHARED, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0]},
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "gemma4_assistant": {"text_config": Nested(model_type="gemma4_text", hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)},
    "glm46v": _SECTIONED,
    "glm4v": _SECTIONED,
    "glm4v_moe": {"text_config": Nested(rope_parameters={**_SECTIONS, "partial_rotary_factor": 0.5}, head_dim=16)},
    "glm_ocr": _SECTIONED,
    "glmga": _SECTIONED,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 5},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "vision_config": Nested(hidden_size=64), "downsample_rate": "1/2"},
    "granitemoehybrid": {"layers_block_type": ["mamba", "mamba", "attention", "mamba"]},
    "hunyuan_vl": _SECTIONED,
    "hy_v4_vl": _SECTIONED,
    "kimi_linear": {"layer_types": ["linear_attention"] * 2 + ["full_attention", "linear_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl": {"text_config": Nested(_BLOCKS)},
    "minimax_m3_vl_text": _BLOCKS,
    "molmo2": {"adapter_config": Nested(vision_feature_layer=[3, 1])},
    "nemotron_h_omni": {"vision_config": Nested(video_temporal_patch_size=2)},
    "paddleocr_vl": _SECTIONED,
    "qwen2_5_omni_thinker": _SECTIONED,
    "qwen2_5_vl": _SECTIONED,
    "qwen2_vl": _SECTIONED,
    "qwen4_exp": {"text_config": Nested(_INDEXER)},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "step3p7": {"text_config": Nested(sliding_window=5, num_sliding_attention_heads=4)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
}  # fmt: skip

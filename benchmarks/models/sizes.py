"""What a field of a configuration shrinks to: by its name, whatever the model type.

Sizes are chosen so that parts matter and can be told apart: four layers of which two are scored, budgets of sparse and
sliding attention below the length of the longest sequence, and fewer key heads than heads where the type has fewer.
"""

from __future__ import annotations

import re

VOCABULARY = 99
FIRST_SPECIAL = 80  # ids from here on are the special tokens; text is drawn from below
LAYERS = 4
LONGEST = 64  # positions

_EXACT: dict[int, str] = {
    1: """n_group num_expert_group topk_group n_groups mamba_n_groups mamba_ngroups encoder_hash_byte_group_nb_functions
        first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts num_dense_layers
        moe_layer_start_index moe_k_dense num_mem_blocks index_local_blocks n_input_layers n_output_layers
        n_layers_per_attn_res_block num_global_layers num_residual_layers num_lstm_layers moe_layer_interval
        expert_layer_offset attn_layer_offset loop_layer_index_start""",
    2: """num_experts_per_tok num_experts_per_token moe_topk moe_k index_topk_blocks num_kv_shared_layers
        n_recurrent_layers num_layers_per_stack o_groups linear_num_key_heads num_lm_heads
        attn_layer_period expert_layer_period layer_group_size global_attn_every_n_layers index_kpool
        zero_expert_num adapter_rank loop_gate_rank hc_lowrank
        num_res_blocks num_codebooks num_quantizers compress_ratio swa_num_key_value_heads
        hidden_size_per_layer_input vision_soft_tokens_per_image audio_soft_tokens_per_image n_mamba_heads
        num_query_groups encoder_hash_byte_group_size decoder_sparse_step_ moe_layer_freq""",
    3: "loop_layer_index_end moe_layer_end_index num_query_tokens latent_query_num",
    4: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers depth layers num_blocks decoder_num_layers conf_num_hidden_layers resampler_depth
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads conf_num_attention_heads resampler_heads
        resampler_n_heads swa_num_attention_heads num_sliding_attention_heads linear_num_value_heads
        linear_num_heads mamba_n_heads mamba_num_heads heads_per_ngram_ index_head_group
        num_experts num_local_experts n_routed_experts moe_num_experts index_block_size_ laurel_rank
        gated_norm_rank sliding_window_pattern_ keep_window_size position_bias_num_buckets
        relative_attention_num_buckets num_buckets local_attn_chunk_length lsh_attn_chunk_length block_size
        index_block_size image_seq_length mm_tokens_per_image video_seq_length num_image_tokens
        num_positions_ resampler_n_latents resampler_num_latents""",
    5: "sliding_window sliding_window_size attention_window_size local_attention_window_len rel_extent",
    6: """index_topk attention_chunk_size local_attention qk_nope_head_dim_ relative_max_distance
        relative_attention_max_distance position_bias_max_distance log_scaling_n_floor floor_scale""",
    8: """head_dim attention_head_dim attention_head_size d_head d_kv dim_head swa_head_dim index_head_dim kv_channels
        qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
        mamba_d_head mamba_headdim mamba_head_dim global_head_dim resampler_head_dim resampler_dim_head
        mamba_d_state state_size ssm_state_size rotary_dim d_rel time_step_rank mamba_dt_rank qk_head_dim_
        kv_lora_rank mamba_chunk_size chunk_size audio_token_size patch_size_ router_hidden_size
        dim_model_base mup_base_width_ o_lora_rank ple_embed_dim split_ngram_parts num_groups_""",
    12: "q_lora_rank shared_expert_size",
    # An indexer of few heads scores many keys with the same zero, and which of them are the first depends on the length.
    16: "qk_head_dim mamba_dim index_n_heads",
    24: """moe_intermediate_size expert_ffn_hidden_size share_expert_dim shared_expert_intermediate_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size moe_hidden_size_""",
    28: "image_size crop_size max_image_size resolution max_img_size",
    14: "patch_size",
    32: """hidden_size d_model n_embd dim emb_dim embed_dim embedding_dim embedding_size hidden_dim word_embed_proj_dim
        attention_hidden_size lru_width hidden_size_global cross_hidden_size encoder_hidden_size
        decoder_hidden_size projection_dim out_hidden_size output_dim text_hidden_size vision_hidden_size
        projection_hidden_dim projector_hidden_size projector_input_dim projector_output_dim vision_output_dim
        input_embedding_size_ output_embedding_size_ backbone_hidden_size image_text_hidden_size d_text
        mamba_d_ssm query_pre_attn_scalar_ base_channels latent_channels codebook_dim adapter_out_dim adapter_in_dim
        merged_hidden_size projection_hidden_size patch_embed_hidden_size image_token_embed_dim moe_hidden_size
        downsample_hidden_size hidden_size_bottleneck output_channels n_codes shape_embed_dim pronunciation_embed_dim
        cross_attention_hidden_size vision_embed_dim z_channels num_pos_feats_ conv_dim""",
    48: """intermediate_size ffn_dim d_ff d_inner dff dim_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
        feed_forward_size n_inner mlp_dim intermediate_size_mlp dense_intermediate_size shared_intermediate_size
        decoder_intermediate_size projection_intermediate_size alignment_intermediate_size""",
    VOCABULARY: """vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size
        encoder_hash_byte_group_vocab ngram_vocab_size_base additional_vocab_size
        mel_vocab_size audio_vocab_size_""",
    LONGEST: """codebook_size num_embeddings max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions
        context_length model_max_length max_2d_position_embeddings num_position_embeddings position_embedding_size
        original_max_position_embeddings""",
}  # fmt: skip
EXACT = {name: size for size, names in _EXACT.items() for name in names.split() if not name.endswith("_")}
_KEY_HEADS = {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "multi_query_groups"}
_HEADS = {name for name, size in EXACT.items() if size == LAYERS and "heads" in name} | {"n_head"}
_WIDTHS = re.compile(r"(_size|_dim|_width|_channels?|_rank)$")
_SPECIAL = re.compile(r"(_token_id|_token_index|_patch_id|_index|im_\w+_id)$")


def shrunk(name: str, value: int, heads: int) -> int:
    """What a field of this name holds in the small model; ``heads`` of the type as it comes, ``value`` included."""
    if name in _KEY_HEADS:
        return 4 if value >= heads else min(2, value)
    if name in EXACT:
        return min(EXACT[name], value) if value >= 0 else value
    return 32 if value > 64 and _WIDTHS.search(name) else value


def is_special(name: str) -> bool:
    """Whether a field holds the id of a special token."""
    return bool(_SPECIAL.search(name))


def heads_of(fields: dict[str, object]) -> int:
    """The number of attention heads of a type as it comes; 0 where it names none."""
    found = [value for name, value in fields.items() if name in _HEADS and isinstance(value, int)]
    return max(found, default=0)


def tail(entries: list, count: int = LAYERS) -> list:
    """The last ``count`` of a list with an entry per layer, kinds that would be missing put where they are scored."""
    kinds = list(dict.fromkeys(map(repr, entries)))
    chosen = entries[-count:]
    for kind in kinds:
        if kind in map(repr, chosen):
            continue
        entry = next(e for e in entries if repr(e) == kind)
        shown = [repr(e) for e in chosen]
        doubles = [i for i in (count - 2, count - 1, *reversed(range(count - 2))) if shown.count(shown[i]) > 1]
        if not doubles:
            break
        chosen[doubles[0]] = entry
    return chosen

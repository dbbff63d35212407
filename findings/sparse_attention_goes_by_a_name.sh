#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: DeepseekV32ForCausalLM (DeepSeek Sparse Attention; GLM MoE DSA and relatives alike).
#
# An attention function may be registered under a name of one's own (AttentionInterface.register), with the mask function
# of sdpa beside it (AttentionMaskInterface.register). A good guess: a function that does nothing but call transformers'
# own sdpa function gives what sdpa gives. It does not: the layer turns its indexer's choice of keys into a mask only where
# the configuration's implementation is NAMED eager or sdpa. Under any other name the choice arrives as a keyword that
# sdpa does not read, and every token attends to everything before it. Nothing is said. While a row is no longer than
# index_topk (2,048 by default) both agree, so that short tests do not show it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0"
"$place/venv/bin/python" - <<'PY'
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def mine(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


AttentionInterface.register("mine", mine)
AttentionMaskInterface.register("mine", sdpa_mask)
torch.manual_seed(0)
config = DeepseekV32Config(
    vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1, index_n_heads=16, index_head_dim=16, index_topk=8, max_position_embeddings=64,
)
model = DeepseekV32ForCausalLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, 1.3 / min(parameter.shape[-2:]) ** 0.5)


def losses(name, length):
    model.set_attn_implementation(name)
    ids = torch.arange(length)[None] * 7 % 61
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")


for length in (8, 48):
    difference = (losses("mine", length) - losses("sdpa", length)).abs()
    print(f"{length} tokens, index_topk 8: losses differ by up to {float(difference.max()):.4f} nats")
    assert (float(difference.max()) > 0.05) == (length > 8), "the behaviour has changed"
PY

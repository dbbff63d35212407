#!/usr/bin/env bash
# bitsandbytes 0.50.2, transformers 5.24.0, torch 2.13.0: a causal model in 8 bits (BitsAndBytesConfig(load_in_8bit=True)).
#
# A good guess: rounding to 8 bits moves every hidden state a little, but a token still depends on nothing that follows it.
# It does: columns of a layer's input in which ANY token of the call exceeds llm_int8_threshold (6.0) are multiplied in
# 16 bits, for ALL tokens of the call. So a late token with an outlier changes what every earlier token, and every other
# row of the batch, is rounded to. Without the threshold (0.0) each token is quantised by itself, and the model is causal.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0" "bitsandbytes==0.50.2" "accelerate==1.15.0"
"$place/venv/bin/python" - "$place" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=64, tie_word_embeddings=False,
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    model.model.embed_tokens.weight[63] = 0.0
    model.model.embed_tokens.weight[63, 5] = 1.0  # a token with one large feature, as trained models have
model.save_pretrained(f"{sys.argv[1]}/model")
before = torch.arange(1, 17)[None]
after = before.clone()
after[0, -1] = 63
for threshold in (6.0, 0.0):
    own = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    loaded = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/model", quantization_config=own, device_map="cpu")
    with torch.no_grad():
        found = [loaded(input_ids=ids).logits[0, :-1].float() for ids in (before, after)]
    moved = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    print(f"llm_int8_threshold={threshold}: another LAST token moves the logits of the tokens before it by {moved:.2e} of the largest")
    assert (moved > 1e-4) == (threshold > 0), "the behaviour has changed"
PY

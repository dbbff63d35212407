#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: Llama4ForConditionalGeneration.
#
# A good guess: the image-text class of a checkpoint runs on token ids alone, as every other image-text class of that
# release does which does not ask for an image (LLaVA, Qwen2.5-VL, Gemma 3, Mistral 3). Its forward raises AttributeError on
# whatever input: it hands out `image_outputs` of what its inner causal model returned, which has no such field.
# Llama4ForCausalLM, the text model of the same checkpoint, runs.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0"
"$place/venv/bin/python" - <<'PY'
import torch
from transformers import (
    Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig, Llama4VisionConfig,
)

text = Llama4TextConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
vision = Llama4VisionConfig(
    hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14,
    vision_output_dim=32, projector_input_dim=32, projector_output_dim=32,
)
ids = torch.arange(3, 11)[None]
print("Llama4ForCausalLM:", tuple(Llama4ForCausalLM(text).eval()(input_ids=ids).logits.shape))
model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).eval()
try:
    model(input_ids=ids)
except AttributeError as error:
    print("Llama4ForConditionalGeneration: AttributeError:", error)
    assert "image_outputs" in str(error), "the behaviour has changed"
else:
    raise SystemExit("the behaviour has changed: it runs")
PY

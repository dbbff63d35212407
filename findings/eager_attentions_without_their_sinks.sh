#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: GraniteSWAForCausalLM (and its mixture), output_attentions=True in eager attention.
#
# A good guess: the attentions that a model returns are the weights with which it adds up its values; gpt-oss, which has
# sinks as well, returns weights that sum to less than one, since the sink takes its share. Here the returned weights sum
# to one, and the sink scales the sum of the values afterwards: what is returned is not what was used. Whoever follows
# attention from a token to later ones (attribution, rollout) is off by that factor, different for each head and token.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0"
"$place/venv/bin/python" - <<'PY'
import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

common = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64, attn_implementation="eager",
)
ids = torch.arange(3, 19)[None]
for name, own in (("granite_swa", {}), ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8})):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**(common | own))).eval()
    attention = model.model.layers[0].self_attn
    seen = []
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attention.v_proj.register_forward_hook(lambda module, args, output: torch.ones_like(output))  # values of one
    with torch.no_grad():
        attention.sinks.fill_(1.0)
        returned = model(input_ids=ids, output_attentions=True).attentions[0].sum(-1)[0, :, -1]
    used = seen[0][0, -1].reshape(4, -1).mean(-1)
    print(f"{name}: returned weights of the last token sum to {returned.tolist()}")
    print(f"{name}: the weights in use sum to                 {used.tolist()}")
    same = torch.allclose(returned, used, atol=1e-3)
    assert same == (name == "gpt_oss"), "the behaviour has changed"
PY

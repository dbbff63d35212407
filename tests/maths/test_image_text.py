"""Image-text checkpoints: loaded as what they are, their text decoder is scored, whatever the vision tower looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.guard import Guard
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.valuer import TokenValuer
from benchmarks.models.weights import randomised
from tests.maths.comparison import sequences, the_same_twice, validation_gradient

TEXT: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def _llava() -> Any:
    """As many layers in the vision tower as in the decoder."""
    vision = hf.CLIPVisionConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4
    )
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_index=60)
    return hf.LlavaForConditionalGeneration(config)


def _qwen() -> Any:
    """Positions in three dimensions, which the whole model makes and not its decoder."""
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}}
    vision = {"depth": 3, "hidden_size": 24, "num_heads": 4, "intermediate_size": 36, "out_hidden_size": 24}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=58, video_token_id=59)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize("build", [_llava, _qwen])
def test_the_text_decoder_is_scored_and_its_values_are_right(build: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        randomised(build(), 1).save_pretrained(tmp_path)
    model: Any = load_model(ModelSource(str(tmp_path)), torch.device("cpu")).double()
    assert type(model) is type(build())
    scored = scored_layers(model, 2)
    assert len(scored.maps) == 14 and all(".language_model.layers." in m.name for m in scored.maps)
    assert scored.coverage.fraction == 1.0
    some = sequences([12, 7], 3)
    assert Guard(scored, "sdpa", 6)(some.ids).hidden < 1e-6
    gradient = validation_gradient(model, 2, [some.batch()])
    valuer = TokenValuer(model, the_same_twice(gradient), 2, 6)
    assert valuer.causal_layers == 2
    values = valuer.value(some.batch(), some.batch().real())["adaptation_direct"]
    model.requires_grad_(True)
    for row in range(2):
        model.zero_grad()
        logits = model(input_ids=torch.tensor([some.ids[row]])).logits[0, :-1]
        F.cross_entropy(logits, torch.tensor(some.labels[row][1:]), reduction="sum", ignore_index=-100).backward()
        wanted = sum((model.get_parameter(n).grad * g).sum() for n, g in gradient.items())
        assert float(values[row].sum()) == pytest.approx(float(wanted), rel=1e-6)


def test_a_checkpoint_whose_image_text_class_does_not_run_is_its_text_decoder(tmp_path: Path) -> None:
    text = hf.Llama4TextConfig(
        **TEXT,
        intermediate_size_mlp=36,
        head_dim=6,
        num_local_experts=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = hf.Llama4VisionConfig(
        hidden_size=24, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14,
        vision_output_dim=24, projector_input_dim=24, projector_output_dim=24,
    )  # fmt: skip
    whole: Any = hf.Llama4ForConditionalGeneration(hf.Llama4Config(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path)
    found: Any = load_model(ModelSource(str(tmp_path)), torch.device("cpu"))
    assert type(found) is hf.Llama4ForCausalLM
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=ids).logits, whole.language_model(input_ids=ids).logits)

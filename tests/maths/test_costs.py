"""Sizes that a plan and a trial read off a model without weights, of models that are laid out in unusual ways."""

import pytest
import torch

from alphatoken.pipeline.maths.costs import forward_flops, meta_model, model_costs, shapes_of
from alphatoken.pipeline.maths.decoder import decoder_layers
from benchmarks.models.small import build, model_types

KINDS = {kind.name: kind for kind in model_types()}
SHAPES = shapes_of([(3, 20)], 30)


@pytest.mark.parametrize("name", ["mamba", "xlstm"])
def test_layers_without_attention_cost_none(name: str) -> None:
    costs, scored = model_costs(meta_model(build(KINDS[name]).config, torch.bfloat16), 2)
    assert costs.attention == costs.value_width == 0 and costs.scored_layers == len(scored.layers) == 2
    assert forward_flops(costs, SHAPES) == 2 * (costs.lower + costs.scored) * SHAPES.tokens > 0


def test_heads_of_several_sizes_count_by_their_mean() -> None:
    model = build(KINDS["gemma4_text"])
    costs, _ = model_costs(meta_model(model.config, torch.bfloat16), 2)
    widths = [layer.self_attn.o_proj.in_features for layer in decoder_layers(model)[1]]
    assert len(set(widths)) > 1 and costs.attention == round(sum(widths) / len(widths))
    assert 0 < costs.value_width < costs.attention


@pytest.mark.parametrize("name", ["diffllama", "nemotron_h_omni", "llama"])
def test_a_model_without_weights_has_the_sizes_of_one_with_weights(name: str) -> None:
    model = build(KINDS[name])
    empty, scored = model_costs(meta_model(model.config, torch.bfloat16), 2)
    assert all(parameter.is_meta for parameter in scored.model.parameters())
    assert empty == model_costs(model, 2)[0] and empty.head > 0

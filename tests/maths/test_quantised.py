"""Lower layers in 8 and 4 bits: all else as it is, the numbers those of the dequantised weights, refusals with a remedy."""

import copy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alphatoken import Directions, TokenValuer
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.guard import Guard
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.placement import Placement
from alphatoken.pipeline.maths.spread import Spread
from benchmarks.models.weights import randomised
from tests.maths.comparison import sequences
from tests.maths.tiny_models import COMMON

CPU = torch.device("cpu")
BATCH = sequences((9, 17, 13), seed=3).batch()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ModelSource:
    place = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 64, "intermediate_size": 128}  # 4-bit products on a CPU want multiples of 32
    randomised(LlamaForCausalLM(LlamaConfig(**(COMMON | sizes))), 0).save_pretrained(place)
    return ModelSource(str(place))


def test_what_is_missing_is_named_with_its_remedy(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    with pytest.raises(UnreadableModel, match=r"model\.lower_dtype=int8 needs bitsandbytes.*pip install bitsandbytes"):
        load_model(source, Placement((CPU,), 1, "int8"))

    config = LlamaConfig(**COMMON, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnreadableModel, match=r"take checkpoints that are not quantised: give the original one"):
        Spread(AutoModelForCausalLM, config, torch.float32, Placement((CPU,), 1, "bfloat16"))


def test_a_device_that_cannot_is_named(source, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("bitsandbytes"), "supported_torch_devices", {"cuda"})
    with pytest.raises(UnreadableModel, match=r"does not run on a cpu: install a newer one, take a GPU, or set"):
        load_model(source, Placement((CPU,), 1, "int4"))


@pytest.mark.parametrize(("bits", "stored"), [("int8", torch.int8), ("int4", torch.uint8)])
def test_lower_layers_alone_are_quantised_and_values_are_those_of_their_weights(source, bits, stored):
    functional = pytest.importorskip("bitsandbytes").functional
    plain = load_model(source, CPU)
    model = load_model(source, Placement((CPU,), 1, bits))
    oracle = copy.deepcopy(plain)
    own = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        lower = name.startswith(("model.layers.0.", "model.layers.1."))
        if lower and parameter.ndim == 2:
            assert parameter.dtype == stored
            if bits == "int8":
                scale = model.get_submodule(name.removesuffix(".weight")).weight.SCB
                weight = parameter.data.float() * scale[:, None] / 127
            else:
                weight = functional.dequantize_4bit(parameter.data, parameter.quant_state).float()
            error = (weight - own[name]).norm() / own[name].norm()
            assert 0 < error < (0.02 if bits == "int8" else 0.2)
            oracle.get_parameter(name).data = weight
        else:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, own[name])
    scored = scored_layers(model, 1)
    assert scored.coverage.fraction == 1.0
    ours, theirs = _entering(model), _entering(oracle)
    assert (ours - theirs).norm() < 0.03 * theirs.norm()  # products of 8 bits, or in bfloat16
    generator = torch.Generator().manual_seed(0)
    weights = scored_layers(plain, 1).weights()
    named = {
        n: {k: torch.randn(w.shape, generator=generator) for k, w in weights.items()}
        for n in ("adaptation", "stability")
    }
    expected, found = (TokenValuer(one, Directions(named), 1, 4).value(BATCH) for one in (oracle, model))
    for name in expected:
        assert (found[name] - expected[name]).norm() < 0.15 * expected[name].norm(), name
    Guard(scored, "sdpa", 4)(BATCH.input_ids.tolist())


def _entering(model) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    scored = scored_layers(model, 1)
    with torch.no_grad(), lower_layers_once(scored, kept):
        scored.decoder(input_ids=BATCH.input_ids, use_cache=False)
    return kept[0]

"""A PEFT adapter directory is a policy: merged over its base, and its product is the drift."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from alphatoken.pipeline.maths.decoder import UnsupportedModel, scored_layers
from alphatoken.pipeline.maths.models import ModelSource, adapter_base, load_model
from tests.conftest import save_model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[Path, Path]:
    """(base directory, directory of a LoRA adapter with random weights over it)."""
    base = save_model(tmp_path_factory.mktemp("base"), seed=4)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    directory = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(directory)
    return base, directory


def test_an_adapter_is_merged_and_its_product_is_the_drift(adapter) -> None:
    base, directory = adapter
    assert adapter_base(str(directory)) == str(base)
    before = scored_layers(AutoModelForCausalLM.from_pretrained(base), 2).weights()
    policy = load_model(ModelSource(str(directory)), torch.device("cpu"))
    after = scored_layers(policy, 2).weights()
    tensors = peft.load_peft_weights(str(directory))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        drift = weight - before[name]
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in tensors:
            product = 2.0 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]  # lora_alpha / r
            torch.testing.assert_close(drift, product, rtol=1e-4, atol=1e-6)
            assert float(product.abs().max()) > 0
        else:
            assert not drift.any()


def test_a_model_that_is_still_wrapped_is_refused_with_the_remedy(adapter) -> None:
    base, directory = adapter
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
    with pytest.raises(UnsupportedModel, match="merge"):
        scored_layers(wrapped, 2)

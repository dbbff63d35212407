"""A PEFT adapter directory is a policy: merged over its base, and its product is the drift."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from alphatoken.pipeline.maths.decoder import UnsupportedModel, scored_layers
from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel, adapter_base
from alphatoken.pipeline.maths.models import load_model
from tests.conftest import save_model
from tests.maths.tiny_models import model_of


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


LINEAR = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, Callable[[], peft.PeftConfig]] = {
    "rsLoRA": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=LINEAR, init_lora_weights=False
    ),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=LINEAR, init_lora_weights=False),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=LINEAR, init_weights=False),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR, init_weights=False),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=LINEAR, init_lora_weights=False
    ),
    "modules_to_save": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    ),
}


def _saved(base: Path, config: peft.PeftConfig, directory: Path) -> peft.PeftModel:
    """A wrapped model whose every adapter parameter matters, and its directory."""
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
            assert "ranknum" not in name or parameter.any()
    wrapped.save_pretrained(directory)
    return wrapped


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_can_be_merged_predicts_as_it_did(
    kind: str, adapter: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = adapter
    wrapped = _saved(base, KINDS[kind](), tmp_path)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
        wanted = wrapped(input_ids=ids).logits
        found = load_model(ModelSource(str(tmp_path)), torch.device("cpu"))(input_ids=ids).logits
    assert not torch.allclose(wanted, plain, rtol=1e-2)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_an_adapter_of_experts_is_merged(tmp_path: Path) -> None:
    model_of("qwen3_moe", seed=1, dtype=torch.float32).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False
    )
    wrapped = _saved(tmp_path / "base", config, tmp_path / "adapter")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        wanted = wrapped(input_ids=ids).logits
        policy = load_model(ModelSource(str(tmp_path / "adapter")), torch.device("cpu"))
        torch.testing.assert_close(policy(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["prompt", "prefix"],
)
def test_what_adds_tokens_and_not_weights_is_refused_by_name(config: Any, adapter: Any, tmp_path: Path) -> None:
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(adapter[0]), config).save_pretrained(tmp_path)
    with pytest.raises(UnreadableModel, match=r"(PROMPT|PREFIX)_TUNING adapter.*cannot be merged into weights"):
        load_model(ModelSource(str(tmp_path)), torch.device("cpu"))


def test_a_bias_that_an_adapter_adds_to_a_map_without_one_is_refused(adapter: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"], init_lora_weights=False)
    _saved(adapter[0], config, tmp_path)
    with pytest.raises(UnreadableModel, match="cannot be merged into its base: .*lora_bias"):
        load_model(ModelSource(str(tmp_path)), torch.device("cpu"))


def test_a_model_that_is_still_wrapped_is_refused_with_the_remedy(adapter) -> None:
    base, directory = adapter
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
    with pytest.raises(UnsupportedModel, match="merge"):
        scored_layers(wrapped, 2)

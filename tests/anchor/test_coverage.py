"""A model whose scored layers hold matrices that cannot be scored, through the command line."""

import json
from pathlib import Path

import pytest

from tests.conftest import SMALL, save_tokenizer


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """A tiny Mixtral: its experts are scored, its routers are not."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    directory = tmp_path_factory.mktemp("mixtral")
    tokenizer = save_tokenizer(directory)
    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256, sliding_window=None,
        initializer_range=0.2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(directory)
    return directory


ROUTERS = [f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)]
# q and o 16 x 16, k and v 8 x 16, four experts of 3 x 24 x 16; the router 4 x 16
SHARE = (768 + 4608) / (768 + 4608 + 64)


def test_what_is_left_out_is_said_in_the_console_the_manifest_and_the_report(alphatoken, tmp_path, experts, train_file):
    run = tmp_path / "run"
    command = [f"run.dir={run}", f"model.policy={experts}", f"data.train={train_file}", *SMALL, "data.validation=6"]
    status, _, err = alphatoken("run", *command)
    assert status == 0, err
    lines = [line for line in err.splitlines() if "warning" in line and "scored layers" in line]
    assert len(lines) == 1 and f"{SHARE:.2%}" in lines[0] and all(name in err for name in ROUTERS)
    coverage = json.loads((run / "run.json").read_text())["stages"]["anchor"]["counts"]["coverage"]
    assert coverage["left_out"] == ROUTERS and coverage["fraction"] == pytest.approx(SHARE)
    page = (run / "report/index.html").read_text()
    assert all(name in page for name in ROUTERS) and f"{SHARE:.1%}" in page
    assert "Nothing is left out" not in page


def test_too_little_coverage_is_an_error_of_one_line_that_names_what_is_left_out(
    alphatoken, tmp_path, experts, train_file
):
    run = tmp_path / "run"
    command = [f"run.dir={run}", f"model.policy={experts}", f"data.train={train_file}", *SMALL, "data.validation=6"]
    status, _, err = alphatoken("run", *command, "valuation.min_coverage=0.995")
    last = err.strip().splitlines()[-1]
    assert status == 1 and "Traceback" not in err
    assert f"{SHARE:.1%}" in last and "valuation.min_coverage=0.995" in last and ROUTERS[0] in last
    assert not (run / "values").exists() and not list((run / "anchors").glob("**/*.safetensors"))
    status, _, err = alphatoken("run", *command, "valuation.min_coverage=1.5")
    assert status == 2 and "valuation.min_coverage" in err and len(err.strip().splitlines()) == 1


def test_a_model_without_forward_mode_derivatives_is_refused_before_the_fisher(alphatoken, tmp_path, train_file):
    from transformers import BloomConfig, BloomForCausalLM

    policy = tmp_path / "bloom"
    tokenizer = save_tokenizer(policy)
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_head=4, n_layer=3)).save_pretrained(
        policy
    )
    command = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL]
    status, _, err = alphatoken("run", *command, "data.validation=6", "valuation.window=0")
    assert status == 1 and "set valuation.scores=[paper,loss,entropy,gradient_norm]" in err
    assert not (tmp_path / "r/anchors/fisher.safetensors").exists()

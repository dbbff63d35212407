"""Completions of a model whose table of positions ends soon after a prompt."""

import pytest
import torch
import transformers as hf

from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.position_table import positions_of
from alphatoken.pipeline.maths.sampling import sample_completions
from tests.maths.tiny_models import COMMON, model_of

POSITIONS, LONG, NEW = 64, 57, 16  # of the tiny models; tokens of the longest prompt


def opt() -> torch.nn.Module:
    return hf.OPTForCausalLM(hf.OPTConfig(**COMMON, ffn_dim=36, word_embed_proj_dim=24)).eval()


@pytest.mark.parametrize("make", [lambda: model_of("gpt2", dtype=torch.float32), opt])
def test_completions_end_where_the_models_positions_do(make) -> None:
    model = make()
    prompts = [list(range(3, 3 + LONG)), [5, 6]]
    torch.manual_seed(0)
    sampled = sample_completions(model, prompts, NEW, 1.0, eos=[])
    assert sampled.lengths.tolist() == [POSITIONS, 2 + POSITIONS - LONG]
    fisher = OuterSum(scored_layers(model, 1), squared=True)
    losses = ghost_pass(scored_layers(model, 1), sampled, fisher)  # which reads the completions to their ends
    assert len(losses) == 2 * (POSITIONS - LONG) and all(bool(one.any()) for one in fisher.total.values())
    assert sample_completions(model, [[5, 6]], NEW, 1.0, eos=[]).lengths.tolist() == [2 + NEW]  # far from the end


def test_positions_that_are_computed_do_not_end_a_completion() -> None:
    model = model_of("llama", dtype=torch.float32)
    assert positions_of(model, 2 * POSITIONS) is None
    assert sample_completions(model, [list(range(3, 3 + LONG))], NEW, 1.0, eos=[]).lengths.tolist() == [LONG + NEW]

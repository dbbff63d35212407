"""Completions are the model's own, whatever else is sampled beside them."""

import pytest
import torch

from alphatoken.pipeline.maths.sampling import sample_completions
from benchmarks.models.small import build, model_types

KINDS = {kind.name: kind for kind in model_types()}
COLD, NEW = 1e-3, 5  # a temperature at which nothing is left to chance; tokens


def continued(model, prompt: list[int]) -> list[int]:
    """The likeliest token, one after the other, by whole passes over the prompt alone."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba", "rwkv", "deepseek_v4"])
def test_what_follows_a_prompt_does_not_depend_on_the_length_of_others(name: str) -> None:
    """The last two take padding in: recurrent states that begin with it, and keys that are compressed by place."""
    model = build(KINDS[name]).float()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 60, (length,), generator=generator).tolist() for length in (9, 4, 6, 4)]
    steps: list[int] = []
    before = torch.get_rng_state()
    sampled = sample_completions(model, prompts, NEW, COLD, eos=[], step=lambda: steps.append(1))
    assert len(steps) == NEW
    for row, prompt in enumerate(prompts):
        assert sampled.input_ids[row, : sampled.lengths[row]].tolist() == continued(model, prompt)
    torch.set_rng_state(before)  # the question whether padding is ignored is asked once, and is left to no chance
    again = sample_completions(model, prompts, NEW, 1.0, eos=[])
    torch.set_rng_state(before)
    assert torch.equal(sample_completions(model, prompts, NEW, 1.0, eos=[]).input_ids, again.input_ids)

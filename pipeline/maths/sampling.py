"""Completions sampled from the reference itself, as the Monte-Carlo Fisher wants them (Eq. 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from alphatoken.pipeline.maths.batch import IGNORED, Batch, collate
from alphatoken.pipeline.maths.placement import device_of
from alphatoken.pipeline.maths.position_table import positions_of


@torch.no_grad()
def sample_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    eos: Sequence[int],
    step: Callable[[], None] = lambda: None,
) -> Batch:
    """Generate one completion per prompt, all in one batch; returns prompt + completion with the completion as labels.

    ``prompts``: unpadded token ids. Sampling is from the model's own distribution (no top-k, no top-p) at
    ``temperature``, from torch's global generator: seed it first. A completion ends with its end-of-sequence token. Where the
    model's table of positions ends sooner than ``max_new_tokens`` after the longest prompt, all completions end there.
    ``step``: called after every token of all completions, at most ``max_new_tokens`` times.
    """
    device = device_of(model)
    pad = eos[0] if eos else 0
    longest = max(len(p) for p in prompts)
    end = positions_of(model, longest + max_new_tokens)
    new = max_new_tokens if end is None else max(1, end - longest)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, as generation wants it
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=new,
        eos_token_id=list(eos) or None, pad_token_id=pad, use_cache=True,
    )  # fmt: skip
    was_training, defaults = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # its penalties and ends would fill in what ``config`` leaves open
    try:
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Steps(step)]),
        )
    finally:
        model.generation_config = defaults
        model.train(was_training)
    sequences, labels = [], []
    for row, prompt in enumerate(prompts):
        completion = _until(generated[row, longest:].tolist(), set(eos))
        sequences.append([*prompt, *completion])
        labels.append([IGNORED] * len(prompt) + completion)
    return collate(sequences, labels).to(device)


class _Steps(StoppingCriteria):
    """Stops nothing: generation asks it after every token."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        """(batch,) bool, all False."""
        self.step()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and including the first that ends a sequence."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens

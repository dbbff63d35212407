"""Completions sampled from the reference itself, as the Monte-Carlo Fisher wants them (Eq. 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from alphatoken.pipeline.maths.batch import IGNORED, Batch, collate
from alphatoken.pipeline.maths.guard import ROUNDING
from alphatoken.pipeline.maths.placement import device_of
from alphatoken.pipeline.maths.position_table import positions_of

_IGNORES_PADDING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


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
    model's table of positions ends sooner than ``max_new_tokens`` after the longest prompt, all completions end there. A
    model that does not ignore the padding before a prompt is given one prompt at a time.
    ``step``: called after every token of all completions, at most ``max_new_tokens`` times.
    """
    device = device_of(model)
    pad = eos[0] if eos else 0
    completions: dict[int, list[int]] = {}
    with _as_it_is(model):
        every = range(len(prompts))
        batches = [list(every)] if _ignores_padding(model, prompts, pad) else [[row] for row in every]
        steps = StoppingCriteriaList([_Steps(step, len(batches))])
        for rows in batches:
            longest = max(len(prompts[row]) for row in rows)
            end = positions_of(model, longest + max_new_tokens)
            config = GenerationConfig(
                do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
                max_new_tokens=max_new_tokens if end is None else max(1, end - longest),
                eos_token_id=list(eos) or None, pad_token_id=pad, use_cache=True,
            )  # fmt: skip
            generated = model.generate(
                **_left_padded([prompts[row] for row in rows], pad, device),
                generation_config=config,
                stopping_criteria=steps,
            )
            for row, tokens in zip(rows, generated[:, longest:].tolist(), strict=True):
                completions[row] = _until(tokens, set(eos))
    sequences = [[*prompt, *completions[row]] for row, prompt in enumerate(prompts)]
    labels = [[IGNORED] * len(prompt) + completions[row] for row, prompt in enumerate(prompts)]
    return collate(sequences, labels).to(device)


@contextmanager
def _as_it_is(model: Any) -> Iterator[None]:
    """Evaluation mode, and none of the model's own penalties and ends, which would fill in what a configuration leaves open."""
    was_training, defaults = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults
        model.train(was_training)


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The prompts as generation wants them."""
    longest = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _ignores_padding(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> bool:
    """Whether a prompt is followed by the same with padding before it: recurrent layers may take it in (RWKV), compressed
    attention may count it (DeepSeek V4). Asked once of a model; draws no random number."""
    short, long = min(prompts, key=len), max(prompts, key=len)
    if len(short) == len(long):
        return True
    if model not in _IGNORES_PADDING:
        alone, beside = (_next_logits(model, some, pad) for some in ([short], [short, long]))
        rounding = 4 * ROUNDING.get(next(model.parameters()).dtype, 5e-2)  # of a router may grow
        _IGNORES_PADDING[model] = bool((alone - beside).norm() <= rounding * alone.norm())
    return _IGNORES_PADDING[model]


def _next_logits(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """After the first of the prompts, (vocabulary,) float64; those that are ruled out are 0."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=1, pad_token_id=pad, return_dict_in_generate=True, output_logits=True
    )
    logits = model.generate(**_left_padded(prompts, pad, device_of(model)), generation_config=config).logits[0][0]
    return torch.nan_to_num(logits.double(), nan=torch.nan, posinf=torch.nan, neginf=0.0)


class _Steps(StoppingCriteria):
    """Stops nothing: generation asks it after every token. ``batches``: that are generated in turn."""

    def __init__(self, step: Callable[[], None], batches: int) -> None:
        self.step, self.batches, self.asked = step, batches, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        """(batch,) bool, all False."""
        self.asked += 1
        if self.asked % self.batches == 0:
            self.step()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and including the first that ends a sequence."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens

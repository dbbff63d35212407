"""What a pass costs, from shapes alone: floating point operations of matrix products, and bytes.

An operation is one multiplication or one addition, so that a product of (m, k) and (k, n) counts 2mkn. Attention counts
the whole square of positions, as torch.utils.flop_counter does. Elementwise work is left out. Models may live on the
meta device: no weight is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from alphatoken.pipeline.maths.adapters import adapter_weights
from alphatoken.pipeline.maths.attention_blocks import BLOCK
from alphatoken.pipeline.maths.batch import by_token_budget
from alphatoken.pipeline.maths.decoder import ScoredLayers, scored_layers, stored
from alphatoken.pipeline.maths.guard import FEW, KEPT, SHORT
from alphatoken.pipeline.maths.head import CHUNK_BYTES, vocabulary_of
from alphatoken.pipeline.maths.linear_maps import is_stacked_experts
from alphatoken.pipeline.maths.models import auto_class

DIRECTIONS = 2  # adaptation and stability


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """The sizes that decide what a pass costs, in matrix parameters; *active* ones are those that a token meets."""

    parameters: int  # all that are stored
    lower: int  # active ones of the layers below the scored ones
    scored: int  # active ones of the scored layers
    scored_stored: int  # of the linear maps that are scored: what a direction has
    head: int  # vocabulary * hidden size
    attention: int  # heads * head size of one layer
    lower_layers: int
    scored_layers: int
    widths: int  # inputs and outputs of all scored linear maps, per token
    adapter_width: int  # weights of adapters of rank 1
    value_width: int  # outputs of one value projection

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.lower_layers + self.scored_layers


def model_costs(model: nn.Module, layers: int) -> tuple[ModelCosts, ScoredLayers]:
    """Read the sizes off a causal language model of transformers; raises UnsupportedModel."""
    scored = scored_layers(model, layers)
    config: Any = scored.model.config.get_text_config()  # type: ignore[union-attr, operator]  # an nn.Module to mypy
    attention, value_width = _attention_widths(config)
    head: Any = scored.model.get_output_embeddings()  # type: ignore[operator]  # as above
    logits = vocabulary_of(scored.model) * config.hidden_size if head is None else head.weight.numel()
    adapter_width = adapter_weights(scored, 1)
    widths = adapter_width + sum(
        _active_experts(config) * sum(m.parameter.shape[-2:]) for m in scored.maps if m.experts
    )
    costs = ModelCosts(
        parameters=sum(p.numel() for p in scored.model.parameters()), lower=_active(scored.lower, config),
        scored=_active(scored.layers, config), scored_stored=scored.coverage.scored, head=logits,
        attention=attention, lower_layers=len(scored.lower), scored_layers=len(scored.layers), widths=widths,
        adapter_width=adapter_width, value_width=value_width,
    )  # fmt: skip
    return costs, scored


def _attention_widths(config: Any) -> tuple[int, int]:
    """Heads * head size of one layer, and the outputs of its value projection; the mean where layers differ (Gemma 4), 0 where
    the configuration names no heads (state-space models)."""
    layers = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]
    found = []
    for one in layers:
        heads = getattr(one, "num_attention_heads", None) or 0
        size = getattr(one, "head_dim", None) or one.hidden_size // max(1, heads)
        found.append((heads * size, (getattr(one, "num_key_value_heads", None) or heads) * size if heads else 0))
    attention, values = (round(sum(widths) / len(found)) for widths in zip(*found, strict=True))
    return attention, values


def _active(layers: Iterable[nn.Module], config: Any) -> int:
    """Matrix parameters that one token meets: of stacked experts, as many as it is sent to."""
    total = 0.0
    for layer in layers:
        stacked = {id(p) for m in layer.modules() if is_stacked_experts(m) for p in m.parameters(recurse=False)}
        for _, parameter, per_expert in stored(layer, ""):
            if parameter.ndim - per_expert >= 2:
                share = _active_experts(config) / parameter.shape[0] if id(parameter) in stacked else 1.0
                total += parameter.numel() * share
    return round(total)


def _active_experts(config: Any) -> int:
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 1


@dataclass(frozen=True, slots=True)
class Shapes:
    """Padded batches by what enters costs: ``tokens`` with padding, ``squares`` = sum of rows * length^2, ``rows``.

    ``blocks``: sum of rows * positions that block-wise attention visits. ``predicting``: response tokens.
    """

    tokens: int
    squares: int
    blocks: int
    predicting: int
    rows: int

    def times(self, factor: float) -> Shapes:
        """The same mix of batches, ``factor`` times as much."""
        values = (self.tokens, self.squares, self.blocks, self.predicting, self.rows)
        return Shapes(*(round(value * factor) for value in values))


def shapes_of(batches: Iterable[tuple[int, int]], predicting: int) -> Shapes:
    """``batches``: (rows, padded length) of each."""
    tokens = squares = blocks = rows = 0
    for count, length in batches:
        rows += count
        tokens += count * length
        squares += count * length * length
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            blocks += count * (stop - start) * stop
    return Shapes(tokens, squares, blocks, predicting, rows)


def budget_shapes(lengths: Sequence[int], predicting: int, budget: int) -> Shapes:
    """Batches as the stages form them: length-sorted, at most ``budget`` padded tokens."""
    groups = by_token_budget(lengths, budget)
    return shapes_of([(len(group), lengths[group[0]]) for group in groups], predicting)


def forward_flops(m: ModelCosts, s: Shapes) -> int:
    """A forward pass through all layers, without the head."""
    return 2 * (m.lower + m.scored) * s.tokens + 4 * m.attention * m.layers * s.squares


def loss_flops(m: ModelCosts, s: Shapes) -> int:
    """A forward pass, with the head at predicting positions alone."""
    return forward_flops(m, s) + 2 * m.head * s.predicting


def lower_flops(m: ModelCosts, s: Shapes) -> int:
    """A forward pass through the layers below the scored ones."""
    return 2 * m.lower * s.tokens + 4 * m.attention * m.lower_layers * s.squares


def backward_flops(m: ModelCosts, s: Shapes) -> int:
    """Backward through the activations of the scored layers, and through the head's loss at predicting positions."""
    return 2 * m.scored * s.tokens + 10 * m.attention * m.scored_layers * s.squares


def head_flops(m: ModelCosts, s: Shapes) -> int:
    """Logits and their errors at the predicting positions."""
    return 4 * m.head * s.predicting


def ghost_flops(m: ModelCosts, s: Shapes) -> int:
    """One ghost pass, without what its visitor does."""
    return forward_flops(m, s) + backward_flops(m, s) + head_flops(m, s)


def outer_flops(m: ModelCosts, positions: int) -> int:
    """Sums of d h^T or of their squares over positions."""
    return 2 * m.scored * positions


def guard_flops(m: ModelCosts, lengths: Sequence[int]) -> int:
    """What `Guard` does with the first rows that it sees: each group untouched, row by row, and twice through the engine."""
    ordered = sorted(length for length in lengths if length > 1)
    if not ordered:
        return 0
    short, middle = min(ordered[0], SHORT), min(ordered[len(ordered) // 2], 2 * SHORT)
    question = min(ordered[-1], FEW)
    total = 2 * loss_flops(m, shapes_of([(1, question)], question))
    for group in ([short], [short, middle], [ordered[-1]]):
        total += sum(loss_flops(m, shapes_of([(1, row)], min(row, KEPT + 1))) for row in group)
        engine = shapes_of([(len(group), max(group))], sum(min(row - 1, KEPT) for row in group))
        total += 2 * loss_flops(m, engine) - lower_flops(m, engine)
    return total


def step_flops(m: ModelCosts, s: Shapes, rank: int = 0) -> int:
    """One step of a simulated run: a ghost pass, and the gradient of what learns; ``rank``: of adapters, 0 of weights."""
    learned = 6 * rank * m.adapter_width * s.tokens if rank else outer_flops(m, s.tokens)
    return ghost_flops(m, s) + learned


def sweep_flops(m: ModelCosts, s: Shapes, objectives: int, rank: int = 0) -> int:
    """The same step in the sweep back: both halves of it, with attention by blocks whose probabilities are held, and for each
    objective a backward pass over both; the head's curvature takes three products. Beside adapters the weights move
    nothing, which spares two thirds of their products."""
    first = step_flops(m, replace(s, squares=s.blocks), rank) - 2 * m.attention * m.scored_layers * s.blocks
    layers = (4 * m.scored + 12 * rank * m.adapter_width if rank else 12 * m.scored) * s.tokens
    layers += 24 * m.attention * m.scored_layers * s.blocks
    return first + objectives * (layers + 6 * m.head * s.predicting)


def value_flops(
    m: ModelCosts,
    s: Shapes,
    window: int,
    snapshots: int = 1,
    scores: Collection[str] = ("paper",),
    exact: bool = False,
    drift: bool = True,
    directions: int = DIRECTIONS,
) -> int:
    """Values of every response token; the lower layers run once for all snapshots.

    ``scores``, ``exact``: what is valued. ``drift``: whether stability moves anything; else its exact column costs nothing.
    ``directions``: along which tokens are valued.
    """
    lower = lower_flops(m, s)
    each = loss_flops(m, s) - lower
    if {"paper", "gradient_norm"} & set(scores):
        each += backward_flops(m, s) + 2 * m.head * s.predicting
    if "paper" in scores:
        given = "information" in scores or exact  # its products M h come with the derivative
        each += 2 * (directions - given) * m.scored * s.predicting
        if window > 0:
            band = 2 * m.attention * s.blocks + 2 * m.value_width * (BLOCK + window) * s.tokens
            each += m.scored_layers * band
    if "information" in scores or exact:
        each += tangent_flops(m, s)
    if exact and drift:  # a forward pass of the scored layers of its own
        each += 2 * m.scored * s.tokens + 4 * m.attention * m.scored_layers * s.squares + tangent_flops(m, s)
    return lower + snapshots * each


def tangent_flops(m: ModelCosts, s: Shapes) -> int:
    """The derivative along one direction beside a forward pass: W h' + M h, attention block by block, and the head."""
    return 4 * m.scored * s.tokens + 10 * m.attention * m.scored_layers * s.blocks + 2 * m.head * s.predicting


def rehearsal_flops(m: ModelCosts, train: Shapes, validation: Shapes, refreshes: int, rho: float, values: int) -> int:
    """A rehearsal over ``train`` whose values cost ``values``: with the masked gradients, and the refreshed directions.

    The lower layers run once for values and gradient, and once for all refreshes.
    """

    def upper(s: Shapes, predicting: int) -> int:
        s = replace(s, predicting=predicting)
        return ghost_flops(m, s) - lower_flops(m, s)

    learned = upper(train, round(rho * train.predicting)) + outer_flops(m, train.tokens)
    directions = upper(validation, validation.predicting) + outer_flops(m, validation.predicting)
    return values + learned + lower_flops(m, validation) + refreshes * directions


def pair_flops(m: ModelCosts, s: Shapes, drift: str, two_models: bool) -> int:
    """What pairs add to values: log-probabilities under the reference, and under the policy before a warm-up."""
    upper = loss_flops(m, s) - lower_flops(m, s)
    return (loss_flops(m, s) if two_models else 0) + (upper if drift == "warmup" else 0)


def value_floor(m: ModelCosts, tokens: int, predicting: int, scores: Collection[str] = ("paper",)) -> int:
    """The least that valuation can cost, without padding and attention: forward; backward through activations and
    contractions; the derivative along one direction, whose products M h the contraction uses as well."""
    floor = 2 * (m.lower + m.scored) * tokens + 2 * m.head * predicting
    if {"paper", "gradient_norm"} & set(scores):
        floor += 2 * m.scored * tokens + 2 * m.head * predicting
    if "paper" in scores:
        floor += 4 * m.scored * predicting
    if "information" in scores:
        floor += 4 * m.scored * tokens + 2 * m.head * predicting
        floor -= 2 * m.scored * predicting if "paper" in scores else 0
    return floor


def sampling_flops(m: ModelCosts, rows: int, prompt: int, new: int) -> int:
    """Sampling ``new`` tokens after ``rows`` prompts padded to ``prompt``: at most, since completions may end early."""
    positions = rows * (prompt + new - 1)
    seen = rows * (prompt * prompt + sum(range(prompt + 1, prompt + new)))
    return 2 * (m.lower + m.scored) * positions + 4 * m.attention * m.layers * seen + 2 * m.head * rows * new


def value_memory(
    m: ModelCosts,
    tokens: int,
    longest: int,
    dtype_bytes: int,
    snapshots: int,
    moved: bool,
    directions: int = DIRECTIONS,
) -> dict[str, int]:
    """Bytes that a worker of the value stage holds at most, about, by what they are for.

    ``tokens`` per batch; ``moved``: snapshots bring their own scored weights.
    """
    float_bytes = max(4, dtype_bytes)
    rows = max(1, tokens // max(1, longest))
    matrices = snapshots * m.scored_stored * (directions * dtype_bytes + (float_bytes if moved else 0))
    activations = 2 * m.widths * tokens * dtype_bytes
    attention = rows * (m.attention // max(1, m.value_width) + 1) * BLOCK * longest * float_bytes * 4
    return {
        "weights": m.parameters * dtype_bytes,
        "directions": matrices,
        "activations": activations + attention,
        "logits": 3 * CHUNK_BYTES,
    }


def meta_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration without storage for its weights."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype)
    return model.to("meta")  # some make a parameter of random numbers that they have drawn on the host

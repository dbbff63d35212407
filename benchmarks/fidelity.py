"""What a value is worth: leave one token out of a gradient step and measure what the validation loss does.

`python -m benchmarks.fidelity` takes a trained model, one training batch and one validation batch. For a sampled token
t of the batch's N response tokens, with g the gradient of the batch's mean loss and g_t that of the token's own loss,

    effect_t(eta) = L_val(theta - eta (g - g_t / N)) - L_val(theta - eta g)

is what leaving t out costs: positive where the token was worth learning. Every score at theta is compared
with it, and with its size, by rank correlation. Everything is float64, so that effects of 1e-9 nats are far above
rounding. Two kinds of step: over the scored layers, where the validation rows' hidden states below them are computed
once; and, for fewer tokens, over all parameters, as training takes it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from alphatoken.pipeline.maths.batch import IGNORED, Batch, collate
from alphatoken.pipeline.maths.capture import swapped
from alphatoken.pipeline.maths.decoder import ScoredLayers, scored_layers
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.head import head_of
from alphatoken.pipeline.maths.kronecker import KroneckerFactors, kfac
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.valuer import TokenValuer
from alphatoken.pipeline.prepare.tokenize import Example
from alphatoken.pipeline.settings import AnchorSettings
from benchmarks.example_batches import load_example
from benchmarks.quality.finetune import cut_responses

LAYERS, WINDOW = 3, 32
DAMPING = AnchorSettings().damping
STEPS = (0.0005, 0.001, 0.01, 0.1)
FULL_STEPS = (0.0002, 0.001)
Weights = dict[str, torch.Tensor]


def batch_of(examples: list[Example], response: int) -> Batch:
    """Whole prompts, each with the first ``response`` tokens of its response."""
    rows = cut_responses([(e.input_ids, e.labels) for e in examples], response)
    return collate([ids for ids, _ in rows], [labels for _, labels in rows])


def only(batch: Batch, position: int) -> Batch:
    """The row of a flat network position, with the token that it predicts as the only label."""
    row, column = divmod(position, batch.shape[1])
    one = batch.rows(slice(row, row + 1))
    labels = torch.full_like(one.labels, IGNORED)
    labels[0, column + 1] = one.labels[0, column + 1]
    return Batch(one.input_ids, labels, one.lengths)


def gradient(scored: ScoredLayers, batch: Batch) -> Weights:
    """Gradient of the SUM of the batch's losses with respect to the scored weights."""
    total = OuterSum(scored)
    ghost_pass(scored, batch, total)
    return total.total


@torch.no_grad()
def logits_of(scored: ScoredLayers, batch: Batch) -> torch.Tensor:
    """Logits (n, vocabulary) at the n positions that predict a response token."""
    outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
    hidden = outputs.last_hidden_state.flatten(0, 1)[batch.predicting()]
    with head_of(scored, outputs) as head:
        return head(hidden)


def mean_loss(scored: ScoredLayers, batch: Batch) -> float:
    """Mean cross-entropy of the batch's response tokens, in nats."""
    return F.cross_entropy(logits_of(scored, batch), batch.labels.flatten()[batch.predicting() + 1]).item()


def preconditioned(scored: ScoredLayers, directions: Directions, batch: Batch, seed: int) -> Directions:
    """The directions divided by Kronecker factors of the batch's rows, under labels sampled from the model."""
    factors = KroneckerFactors(scored)
    factors.positions = predicting = batch.predicting()
    chances = logits_of(scored, batch).softmax(dim=-1)
    labels = torch.full_like(batch.labels, IGNORED).flatten()
    labels[predicting + 1] = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    ghost_pass(scored, Batch(batch.input_ids, labels.view_as(batch.labels), batch.lengths), factors)
    named = {
        name: {m.name: kfac(matrices[m.name], factors.total, m, DAMPING) for m in scored.maps}
        for name, matrices in directions.named.items()
    }
    return Directions(named)


def estimates(scored: ScoredLayers, train: Batch, validation: Batch, sampled: torch.Tensor, seed: int) -> Weights:
    """Every score of the sampled positions (n,), higher meaning more worth learning."""
    positions = validation.predicting()
    total = OuterSum(scored)
    total.positions = positions
    ghost_pass(scored, validation, total)
    adaptation = {n: t / len(positions) for n, t in total.total.items()}
    still = {n: torch.zeros_like(t) for n, t in adaptation.items()}  # no stability
    directions = Directions({"adaptation": adaptation, "stability": still})
    curved = preconditioned(scored, directions, train, seed)

    def columns(directions: Directions, scores: Sequence[str]) -> Weights:
        found = TokenValuer(scored.model, directions, LAYERS, WINDOW, scores=scores, exact=True).value(train)
        return {name: column.flatten()[sampled + 1] for name, column in found.items()}

    plain = columns(directions, ["paper", "information", "loss", "entropy"])
    kfac = columns(curved, ["information"])
    return {
        "ghost, direct": plain["adaptation_direct"],
        "ghost, direct + causal": plain["adaptation_direct"] + plain["adaptation_causal"],
        "exact over the scored layers": plain["adaptation_exact"],
        "exact, K-FAC": kfac["adaptation_exact"],
        "information": plain["information"],
        "information, K-FAC": kfac["information"],
        "entropy": plain["entropy"],
        "minus the token's loss": -plain["loss"],
        "random": torch.rand(len(sampled), generator=torch.Generator().manual_seed(seed)),
    }


def scored_effects(scored: ScoredLayers, train: Batch, validation: Batch, sampled: torch.Tensor) -> torch.Tensor:
    """Effects (steps, n) of a step over the scored layers; prints what each whole step does."""
    count, base = len(train.predicting()), {n: w.clone() for n, w in scored.weights().items()}
    whole = {n: g / count for n, g in gradient(scored, train).items()}
    effects = torch.zeros(len(STEPS), len(sampled), dtype=torch.float64)
    with lower_layers_once(scored):
        before = mean_loss(scored, validation)
        after = []
        for eta in STEPS:
            with swapped(scored, {n: w - eta * whole[n] for n, w in base.items()}):
                after.append(mean_loss(scored, validation))
    print(f"validation loss {before:.6f}; change by the whole step:", end=" ")
    print(", ".join(f"eta {eta}: {a - before:+.2e}" for eta, a in zip(STEPS, after, strict=True)), flush=True)
    own = []  # float32 is enough for the difference itself, which is added to float64 weights
    for position in sampled.tolist():
        own.append({n: (g / count).float() for n, g in gradient(scored, only(train, position)).items()})
        if len(own) == 8 or position == int(sampled[-1]):
            first = int((sampled == position).nonzero()) - len(own) + 1
            with lower_layers_once(scored):
                for offset, one in enumerate(own):
                    for index, eta in enumerate(STEPS):
                        moved = {n: w - eta * whole[n] + eta * one[n] for n, w in base.items()}
                        with swapped(scored, moved):
                            effects[index, first + offset] = mean_loss(scored, validation) - after[index]
            own = []
    return effects


@contextmanager
def stepped(parameters: Mapping[str, nn.Parameter], step: Weights, eta: float) -> Iterator[None]:
    """All parameters at theta - eta * step for one block of code, and exactly at theta afterwards."""
    before = {n: p.data for n, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = before[name] - eta * step[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def full_gradient(scored: ScoredLayers, batch: Batch) -> Weights:
    """Gradient of the SUM of the batch's losses with respect to every parameter, by plain autograd."""
    parameters = dict(scored.model.named_parameters())
    scored.model.requires_grad_(True)
    logits = scored.model(input_ids=batch.input_ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    scored.model.requires_grad_(False)
    return found


def full_effects(
    scored: ScoredLayers, train: Batch, validation: Batch, sampled: torch.Tensor, steps: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Effects (steps, n) of a step over all parameters, and <g_t, grad L_val> over all parameters (n,)."""
    parameters = dict(scored.model.named_parameters())
    count, checked = len(train.predicting()), len(validation.predicting())
    whole = {n: g / count for n, g in full_gradient(scored, train).items()}
    target = {n: g / checked for n, g in full_gradient(scored, validation).items()}
    after = []
    for eta in steps:
        with stepped(parameters, whole, eta):
            after.append(mean_loss(scored, validation))
    effects = torch.zeros(len(steps), len(sampled), dtype=torch.float64)
    products = torch.zeros(len(sampled), dtype=torch.float64)
    for index, position in enumerate(sampled.tolist()):
        own = full_gradient(scored, only(train, position))
        products[index] = sum((g * target[n]).sum() for n, g in own.items())
        without = {n: whole[n] - own[n] / count for n in own}
        for row, eta in enumerate(steps):
            with stepped(parameters, without, eta):
                effects[row, index] = mean_loss(scored, validation) - after[row]
    return effects, products


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks; no ties are expected among float64 values."""
    return values.argsort().argsort().double()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's correlation; Spearman's when called with ranks."""
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()


def table(title: str, steps: tuple[float, ...], effects: torch.Tensor, scores: Weights) -> None:
    """Rank correlation of every score with the effects, by step size, and how linear the steps are."""
    print(f"\n| {title} | " + " | ".join(f"eta {eta}" for eta in steps) + " |")
    print("|---" * (len(steps) + 1) + "|")
    for name, score in scores.items():
        found = [correlation(ranks(score), ranks(effect)) for effect in effects]
        print(f"| {name} | " + " | ".join(f"{value:+.3f}" for value in found) + " |")
    linear = [correlation(effects[0], effect) for effect in effects]
    print("| linearity: correlation with the smallest step | " + " | ".join(f"{v:.4f}" for v in linear) + " |")
    slopes = [((effects[0] * e).sum() / effects[0].square().sum() * steps[0] / eta).item()
              for eta, e in zip(steps, effects, strict=True)]  # fmt: skip
    print(
        "| linearity: effect per eta over that of the smallest step | " + " | ".join(f"{v:.3f}" for v in slopes) + " |"
    )


def main() -> None:
    """Print both tables with their size and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--all-parameters", type=int, default=30, help="tokens of the second table; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, examples = load_example()
    scored = scored_layers(model.double().requires_grad_(False), LAYERS)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(options.seed)).tolist()
    validation = batch_of([examples[i] for i in order[:4]], 48)
    train = batch_of([examples[i] for i in order[4:8]], 64)
    predicting = train.predicting()
    chosen = torch.randperm(len(predicting), generator=torch.Generator().manual_seed(options.seed))
    sampled = predicting[chosen[: options.tokens]]
    print(f"SmolLM2-135M-Instruct, float64, K={LAYERS}, W={WINDOW}, seed {options.seed}: {len(sampled)} of {len(predicting)} "
          f"response tokens of 4 rows; validation: {len(validation.predicting())} response tokens of 4 other rows")  # fmt: skip
    scores = estimates(scored, train, validation, sampled, options.seed)
    started = time.perf_counter()
    effects = scored_effects(scored, train, validation, sampled)
    table(f"step over the scored layers, {len(sampled)} tokens", STEPS, effects, scores)
    table("the same, size of the effect without its sign", STEPS, effects.abs(), scores)
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)
    if options.all_parameters:
        few = sampled[: options.all_parameters]
        effects, products = full_effects(scored, train, validation, few, FULL_STEPS)
        some = {name: score[: len(few)] for name, score in scores.items()} | {"exact over all parameters": products}
        table(f"step over all parameters, {len(few)} tokens", FULL_STEPS, effects, some)


if __name__ == "__main__":
    main()

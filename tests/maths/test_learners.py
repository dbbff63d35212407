"""Whatever learns in a trial learns what torch's own optimizer makes of a plain copy of the model: adapters, every weight."""

import copy

import pytest
import torch

from alphatoken.pipeline.maths.adapters import DOWN, SCALE, UP, Adapters, adapted, all_layers
from alphatoken.pipeline.maths.decoder import UnsupportedModel, scored_layers
from alphatoken.pipeline.maths.divergence import ReferencePredictions
from alphatoken.pipeline.maths.epochs import row_order
from alphatoken.pipeline.maths.learners import EveryWeight, ScoredWeights
from alphatoken.pipeline.maths.trial import Entering, Fit, LabelledTokens, fine_tune, held_out_losses
from alphatoken.pipeline.maths.warmup import schedule
from benchmarks.models.small import build, model_types
from tests.maths.test_trial import (
    BUDGET,
    KERNEL,
    LENGTHS,
    masked,
    plain_fine_tune,
    plain_losses,
    sequences,
    with_norms_in_float64,
)
from tests.maths.tiny_models import model_of

TRAIN, HELD_OUT = masked(sequences(LENGTHS, seed=1)), sequences([8, 13, 10], seed=2)


def fit_of(learning_rate: float) -> Fit:
    return Fit(row_order(len(TRAIN), 2, 6, seed=3), learning_rate, KERNEL, BUDGET)


def assert_learned(learner, fit: Fit, twin, tolerance: float) -> dict[str, torch.Tensor]:
    """Losses after the learner's fine-tune are those of ``twin``, which learned by itself; the model is as before."""
    model = learner.scored.model
    before, learn = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    weights, trained = fine_tune(learner, LabelledTokens(Entering(TRAIN)), fit, lambda steps: None)
    sums, counts = held_out_losses(learner, weights, Entering(HELD_OUT), fit)
    for row in range(len(HELD_OUT)):
        with torch.no_grad():
            expected, untouched = plain_losses(twin, HELD_OUT, row), plain_losses(model, HELD_OUT, row)
        assert sums[row] / counts[row] == pytest.approx(expected.mean().item(), abs=tolerance)
        assert abs(expected.mean() - untouched.mean()) > 1e-3  # the steps have moved it
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == learn
    assert trained == sum(label != -100 for rows in fit.order for row in rows for label in TRAIN.labels[row][1:])
    return weights


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_learns_as_in_a_plain_fine_tune(tied: bool) -> None:
    model = with_norms_in_float64(model_of("llama"))
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    scored, fit = scored_layers(model, 2), fit_of(2e-3)
    names = [name for name, _ in model.named_parameters()]
    learner = EveryWeight(scored)
    assert sorted(learner.start()) == sorted(names)  # gains, embeddings and head as well, tied ones once
    twin = plain_fine_tune(model, names, TRAIN, fit)
    weights = assert_learned(learner, fit, twin, 1e-9)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=1e-8)


def test_every_weight_of_experts_learns_and_those_that_meet_no_token_stay() -> None:
    model = model_of("gpt_oss")
    fit = fit_of(2e-3)
    twin = plain_fine_tune(model, [name for name, _ in model.named_parameters()], TRAIN, fit)
    assert_learned(EveryWeight(scored_layers(model, 2)), fit, twin, 1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_those_of_peft(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = with_norms_in_float64(model_of(family))
    learner, fit = Adapters(all_layers(model), rank=3, seed=7), fit_of(5e-3)
    names = [one.name.removesuffix(".weight") for one in adapted(learner.scored)[0]]
    assert len(names) == {"llama": 21, "gpt2": 12}[family]
    config = LoraConfig(r=3, lora_alpha=3 * SCALE, target_modules=names, fan_in_fan_out=family == "gpt2")
    theirs = get_peft_model(copy.deepcopy(model), config).double()
    inner = theirs.base_model.model
    start = learner.start()
    for name in names:
        down = inner.get_submodule(name).lora_A["default"].weight
        assert start[f"{name}.weight.{DOWN}"].abs().max() <= down.shape[1] ** -0.5
        with torch.no_grad():
            down.copy_(start[f"{name}.weight.{DOWN}"])
    learning = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=fit.learning_rate, weight_decay=0.0)
    for step, chosen in enumerate(fit.order):
        optimizer.zero_grad()
        torch.cat([plain_losses(theirs, TRAIN, row) for row in chosen]).mean().backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.param_groups[0]["lr"] = fit.learning_rate * schedule(step, len(fit.order))
        optimizer.step()
    weights = assert_learned_adapters(learner, fit, theirs)
    for name in names:
        up = inner.get_submodule(name).lora_B["default"].weight.detach()
        torch.testing.assert_close(weights[f"{name}.weight.{UP}"], up, rtol=0, atol=1e-8)


def assert_learned_adapters(learner: Adapters, fit: Fit, theirs) -> dict[str, torch.Tensor]:
    weights, _ = fine_tune(learner, LabelledTokens(Entering(TRAIN)), fit, lambda steps: None)
    sums, counts = held_out_losses(learner, weights, Entering(HELD_OUT), fit)
    untouched, _ = held_out_losses(learner, learner.start(), Entering(HELD_OUT), fit)
    with torch.no_grad():
        for row in range(len(HELD_OUT)):
            assert sums[row] / counts[row] == pytest.approx(plain_losses(theirs, HELD_OUT, row).mean().item(), abs=1e-9)
            plain = plain_losses(learner.scored.model, HELD_OUT, row)
            assert untouched[row] / counts[row] == pytest.approx(plain.mean().item(), abs=1e-9)
    assert (sums - untouched).abs().min() > 1e-2
    return weights


def test_adapters_are_the_same_for_a_seed_and_experts_get_none() -> None:
    scored = all_layers(model_of("llama"))
    one, same, other = (Adapters(scored, 2, seed).start() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    mixed = all_layers(model_of("mixtral"))
    kept, left_out = adapted(mixed)
    assert len(kept) == 12 and {m.name.rpartition(".")[2] for m in left_out} == {"gate_up_proj", "down_proj"}
    with pytest.raises(UnsupportedModel, match="stacked experts"):
        Adapters(type(mixed)(*[getattr(mixed, f) if f != "maps" else tuple(left_out) for f in mixed.__slots__]), 2, 0)


@pytest.mark.parametrize("make", [EveryWeight, lambda scored: Adapters(all_layers(scored.model), 2, 0)])
def test_divergence_knows_of_what_has_learned_below_and_in_the_head(make) -> None:
    model = model_of("llama")
    scored, completions = scored_layers(model, 2), sequences(LENGTHS, seed=4)
    learner, rows = make(scored), Entering(completions)
    reference = ReferencePredictions(scored, rows, KERNEL, BUDGET)
    assert reference.divergences(learner, learner.start(), rows)[0].abs().max() < 1e-9
    generator = torch.Generator().manual_seed(0)
    moved = {n: w + 0.05 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in learner.start().items()}
    expected = []
    with torch.no_grad():
        for ids, labels in zip(completions.input_ids, completions.labels, strict=True):
            theirs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            with learner.holding(moved):
                own = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            gaps = (theirs.exp() * (theirs - own)).sum(-1)
            expected.append(gaps[torch.tensor(labels)[1:] != -100].sum().item())
    sums, _ = reference.divergences(learner, moved, rows)
    assert sums.tolist() == pytest.approx(expected, abs=1e-9) and min(expected) > 1e-3


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_models_whose_layers_share_more_than_the_hidden_state_are_fine_tuned_by_whole_passes(name: str) -> None:
    model = build(next(kind for kind in model_types() if kind.name == name))
    scored, fit = scored_layers(model, 2), fit_of(5e-3)
    assert not scored.shared
    learner = ScoredWeights(scored)
    twin = plain_fine_tune(model, learner.start(), TRAIN, fit)
    assert_learned(learner, fit, twin, 3e-4)  # of losses of 12 to 33 nats: these round inside, in float32

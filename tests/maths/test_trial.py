"""Short fine-tunes over kept hidden states are fine-tunes of the same weights by torch's own optimizer on the whole model."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from alphatoken.pipeline.maths import head
from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from alphatoken.pipeline.maths.decoder import no_scored_layers, scored_layers
from alphatoken.pipeline.maths.divergence import ReferencePredictions
from alphatoken.pipeline.maths.epochs import row_order
from alphatoken.pipeline.maths.learners import ScoredWeights
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.trial import Entering, Fit, LabelledTokens, entering_hidden, fine_tune, held_out_losses
from alphatoken.pipeline.maths.warmup import schedule
from tests.maths import comparison
from tests.maths.tiny_models import model_of, nearby

LENGTHS = [9, 14, 6, 11, 17]
KERNEL, LAYERS, BUDGET = "sdpa", 2, 30


def sequences(lengths: list[int], seed: int, vocabulary: int = 61) -> Sequences:
    made = comparison.sequences(lengths, seed, vocabulary)
    return Sequences([f"row-{i}" for i in range(len(lengths))], made.ids, made.labels)


def entering(scored, rows: Sequences) -> Entering:
    held = [entering_hidden(scored, ids, KERNEL) for ids in rows.input_ids]
    return Entering(rows, held.__getitem__)


def masked(rows: Sequences) -> Sequences:
    """Every third label away, and one row without any."""
    labels = [
        [IGNORED if i % 3 == 0 or row == 2 else t for i, t in enumerate(own)] for row, own in enumerate(rows.labels)
    ]
    return Sequences(rows.ids, rows.input_ids, labels)


def plain_losses(model, rows: Sequences, row: int) -> torch.Tensor:
    """Cross-entropies of one sequence's labelled tokens by the model's own forward pass."""
    logits = model(torch.tensor([rows.input_ids[row]])).logits[0, :-1]
    labels = torch.tensor(rows.labels[row])[1:]
    return cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")[labels != IGNORED]


def plain_fine_tune(model, names, rows: Sequences, fit: Fit) -> torch.nn.Module:
    """The same steps one sequence at a time, without any cache, by torch.optim.AdamW on parameters of a copy."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in names)
    learning = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=fit.learning_rate, weight_decay=0.0)
    for step, chosen in enumerate(fit.order):
        optimizer.zero_grad()
        losses = torch.cat([plain_losses(twin, rows, row) for row in chosen])
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.param_groups[0]["lr"] = fit.learning_rate * schedule(step, len(fit.order))
        optimizer.step()
    return twin


def with_norms_in_float64(model):
    """transformers' root-mean-square norms compute in float32 whatever the model's dtype; torch's own does not."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return model


@pytest.mark.parametrize(
    ("family", "tolerance"), [("llama", 1e-9), ("gpt2", 1e-9), ("gemma2", 1e-6), ("gpt_oss", 1e-6)]
)
def test_losses_after_a_trial_are_those_of_a_plain_fine_tune(family: str, tolerance: float) -> None:
    model = with_norms_in_float64(model_of(family))
    scored = scored_layers(model, LAYERS)
    before = copy.deepcopy(model.state_dict())
    train, held_out = masked(sequences(LENGTHS, seed=1)), sequences([8, 13, 10], seed=2)
    fit = Fit(row_order(len(train), 2, 6, seed=3), 5e-3, KERNEL, BUDGET)
    steps: list[int] = []
    weights, trained = fine_tune(ScoredWeights(scored), LabelledTokens(entering(scored, train)), fit, steps.append)
    sums, counts = held_out_losses(ScoredWeights(scored), weights, entering(scored, held_out), fit)
    twin = plain_fine_tune(model, weights, train, fit)
    with torch.no_grad():
        expected = [plain_losses(twin, held_out, row) for row in range(len(held_out))]
        untouched = [plain_losses(model, held_out, row) for row in range(len(held_out))]
    for row, losses in enumerate(expected):
        assert counts[row] == len(losses)
        assert sums[row] / counts[row] == pytest.approx(losses.mean().item(), abs=tolerance)
        assert abs(losses.mean() - untouched[row].mean()) > 1e-3  # the steps have moved it
    assert trained == sum(label != IGNORED for rows in fit.order for row in rows for label in train.labels[row][1:])
    assert steps == [1] * 6
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("same", [True, False])
def test_divergence_is_that_of_whole_distributions_over_completions(
    same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CACHE_BYTES", 61 * 8 * 3)  # a few rows at a time
    model = model_of("llama")
    reference = model if same else nearby(model, seed=5)
    scored, completions = scored_layers(model, LAYERS), sequences(LENGTHS, seed=4)
    weights = {name: w + 0.05 * torch.randn(w.shape, dtype=w.dtype) for name, w in scored.weights().items()}
    twin = copy.deepcopy(model)
    twin.load_state_dict({**twin.state_dict(), **weights})
    expected = []
    with torch.no_grad():
        for ids, labels in zip(completions.input_ids, completions.labels, strict=True):
            theirs, own = (m(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for m in (reference, twin))
            divergences = kl_div(own, theirs, log_target=True, reduction="none").sum(-1)
            expected.append(divergences[torch.tensor(labels)[1:] != IGNORED].sum().item())
    entered = entering(scored, completions)
    theirs_of = scored if same else no_scored_layers(copy.deepcopy(reference))
    held = ReferencePredictions(theirs_of, entered if same else Entering(completions), KERNEL, BUDGET)
    if not same:
        held.without_layers()
    sums, counts = held.divergences(ScoredWeights(scored), weights, entered)
    assert sums.tolist() == pytest.approx(expected, abs=1e-9) and min(expected) > 1e-3
    assert counts.tolist() == [sum(label != IGNORED for label in labels[1:]) for labels in completions.labels]
    untouched = held.divergences(ScoredWeights(scored), scored.weights(), entered)[0]
    assert untouched.abs().max() < 1e-9 if same else untouched.min() > 1e-3


def test_a_token_that_cannot_follow_adds_nothing_to_the_divergence() -> None:
    """Logits of minus infinity, as of rows of a head that stand for no token: as of a vocabulary that ends before."""
    allowed, found = 55, []
    completions = Entering(sequences(LENGTHS, seed=4, vocabulary=allowed))
    for ruled_out in (True, False):
        model = model_of("llama")
        if ruled_out:
            bias = torch.where(torch.arange(61) < allowed, 0.0, -torch.inf)
            model.lm_head.register_forward_hook(lambda module, args, logits, bias=bias: logits + bias)
        else:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:allowed].detach().clone())
        scored = scored_layers(model, LAYERS)
        moved = {name: 1.1 * weight for name, weight in scored.weights().items()}
        reference = ReferencePredictions(scored, completions, KERNEL, BUDGET)
        found.append(reference.divergences(ScoredWeights(scored), moved, completions)[0].tolist())
    assert found[0] == pytest.approx(found[1], abs=1e-9) and min(found[0]) > 1e-3


def test_the_order_of_rows_depends_on_the_seed_and_every_row_has_its_turn() -> None:
    order = row_order(10, 4, 5, seed=1)
    flat = [row for rows in order for row in rows]
    assert [len(rows) for rows in order] == [4] * 5
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert order == row_order(10, 4, 5, seed=1) != row_order(10, 4, 5, seed=2)
    assert [len(rows) for rows in row_order(3, 8, 2, seed=0)] == [8, 8]


def test_a_fine_tune_that_bursts_names_the_step_and_the_row() -> None:
    model = model_of("llama", dtype=torch.float32)
    scored = scored_layers(model, LAYERS)
    rows = sequences(LENGTHS, seed=1)
    fit = Fit([[1, 3], [0, 4]], math.inf, KERNEL, BUDGET)
    with pytest.raises(NonFinite, match="step 2") as error:
        fine_tune(ScoredWeights(scored), LabelledTokens(entering(scored, rows)), fit, lambda steps: None)
    assert error.value.row in (0, 4)

"""Preference pairs in a trial: steps over kept hidden states are those of plain DPO on the whole model."""

import copy

import pytest
import torch
from torch.nn.functional import logsigmoid

from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.epochs import row_order
from alphatoken.pipeline.maths.learners import EveryWeight, ScoredWeights
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.pair_trial import MaskedPairs, margins, pair_losses, reward_accuracy
from alphatoken.pipeline.maths.trial import Entering, Fit, entering_hidden, fine_tune, held_out_losses
from alphatoken.pipeline.maths.warmup import schedule
from tests.maths.test_trial import KERNEL, sequences, with_norms_in_float64
from tests.maths.tiny_models import model_of, nearby

BETA, LAYERS, BUDGET = 0.4, 2, 60
CHOSEN, REJECTED = [9, 14, 6, 11, 17], [12, 8, 13, 10, 7]


def pairs_of(seed: int, chosen: list[int], rejected: list[int]) -> Sequences:
    """All chosen branches, then all rejected ones."""
    one, other = sequences(chosen, seed), sequences(rejected, seed + 100)
    return Sequences([*one.ids, *other.ids], [*one.input_ids, *other.input_ids], [*one.labels, *other.labels])


def masked(rows: Sequences) -> list[list[int]]:
    """Every third label away, and of one rejected branch all."""
    return [
        [IGNORED if i % 3 == 0 or row == 7 else label for i, label in enumerate(own)]
        for row, own in enumerate(rows.labels)
    ]


def token_logps(model, ids: list[int]) -> torch.Tensor:
    """Log-probability (length,) of every token by the model's own forward pass, 0 of the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    found = logits.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    return torch.cat([found.new_zeros(1), found])


def summed(model, rows: Sequences) -> torch.Tensor:
    """Log-probabilities of whole responses."""
    with torch.no_grad():
        return torch.stack(
            [
                token_logps(model, ids)[torch.tensor(labels) != IGNORED].sum()
                for ids, labels in zip(rows.input_ids, rows.labels, strict=True)
            ]
        )


def plain_dpo(model, names, rows: Sequences, kept: list[list[int]], reference: torch.Tensor, fit: Fit):
    """Eq. 14 written out, one pair at a time, by torch.optim.AdamW on parameters of a copy."""
    twin, pairs = copy.deepcopy(model), len(rows) // 2
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in names)
    learning = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=fit.learning_rate, weight_decay=0.0)

    def branch(row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The response's gain over the reference, and the mean loss of its kept tokens."""
        logps = token_logps(twin, rows.input_ids[row])
        whole = logps[torch.tensor(rows.labels[row]) != IGNORED].sum() - reference[row]
        learned = -logps[torch.tensor(kept[row]) != IGNORED]
        return whole, learned.mean() if len(learned) else learned.sum()

    for step, chosen in enumerate(fit.order):
        optimizer.zero_grad()
        losses = []
        for row in chosen:
            (won, good), (lost, bad) = branch(row), branch(row + pairs)
            omega = BETA * torch.sigmoid(-BETA * (won - lost)).detach()
            losses.append(omega * (good - bad))
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.param_groups[0]["lr"] = fit.learning_rate * schedule(step, len(fit.order))
        optimizer.step()
    return twin


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("every", [False, True])
def test_margins_after_a_trial_are_those_of_plain_dpo(same: bool, every: bool) -> None:
    model = with_norms_in_float64(model_of("llama"))
    reference = model if same else nearby(model, seed=5)
    train, held_out = pairs_of(1, CHOSEN, REJECTED), pairs_of(2, [8, 13, 10], [9, 7, 12])
    kept, theirs = masked(train), [summed(reference, rows) for rows in (train, held_out)]
    scored = scored_layers(model, LAYERS)
    learner = EveryWeight(scored) if every else ScoredWeights(scored)

    def entering(rows: Sequences) -> Entering:
        held = [] if every else [entering_hidden(scored, ids, KERNEL) for ids in rows.input_ids]
        return Entering(rows, None if every else held.__getitem__)

    fit = Fit(row_order(5, 2, 6, seed=3), 5e-3, KERNEL, BUDGET)
    steps: list[int] = []
    objective = MaskedPairs(entering(train), kept, theirs[0], BETA)
    assert len(objective.groups(fit.order[0], 20)) == 2  # more passes than one
    weights, trained = fine_tune(learner, objective, fit, steps.append)
    losses, counts = held_out_losses(learner, weights, entering(held_out), fit)
    found = margins(losses, theirs[1], BETA)
    twin = plain_dpo(model, weights, train, kept, theirs[0], fit)
    gains = summed(twin, held_out) - theirs[1]
    expected = BETA * (gains[:3] - gains[3:])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    before = summed(model, held_out) - theirs[1]
    assert (expected - BETA * (before[:3] - before[3:])).abs().min() > 1e-3  # the steps have moved it
    assert trained == sum(
        label != IGNORED for rows in fit.order for row in rows for r in (row, row + 5) for label in kept[r][1:]
    )
    assert steps == [1] * 6 and counts.tolist() == [sum(x != IGNORED for x in own) for own in held_out.labels]
    tight = Fit(fit.order, fit.learning_rate, KERNEL, 1)  # each pair by itself
    again = fine_tune(learner, objective, tight, steps.append)[0]
    for name, weight in weights.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-9)


def test_losses_and_accuracy_of_margins() -> None:
    s = torch.tensor([-1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(pair_losses(s), -logsigmoid(s))
    assert reward_accuracy(s) == 0.625 and reward_accuracy(torch.zeros(3)) == 0.5


def test_a_fine_tune_on_pairs_that_bursts_names_the_branch() -> None:
    model = model_of("llama", dtype=torch.float32)
    rows, scored = pairs_of(1, CHOSEN, REJECTED), scored_layers(model, LAYERS)
    held = [entering_hidden(scored, ids, KERNEL) for ids in rows.input_ids]
    objective = MaskedPairs(Entering(rows, held.__getitem__), rows.labels, torch.zeros(10), BETA)
    with pytest.raises(NonFinite, match="step 2") as error:
        fine_tune(ScoredWeights(scored), objective, Fit([[1], [0]], float("inf"), KERNEL, BUDGET), lambda steps: None)
    assert error.value.row in (0, 5)

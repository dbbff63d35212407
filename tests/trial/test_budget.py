"""What a trial costs against a counter on the engine, and how far it goes in the time there is."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from alphatoken.pipeline.maths.adapters import Adapters, all_layers
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.costs import model_costs
from alphatoken.pipeline.maths.divergence import ReferencePredictions
from alphatoken.pipeline.maths.learners import EveryWeight, ScoredWeights
from alphatoken.pipeline.maths.pair_trial import MaskedPairs
from alphatoken.pipeline.maths.trial import Entering, Fit, LabelledTokens, entering_hidden, fine_tune, held_out_losses
from alphatoken.pipeline.settings import TrialSettings
from alphatoken.pipeline.trial.budget import SECONDS, Lengths, extent, lengths_of, steps_of, trial_flops
from tests.maths import comparison
from tests.maths.tiny_models import model_of

BUDGET = 512


class Operations(TorchDispatchMode):
    """As FlopCounterMode, which asks for a gradient function of every module's input and finds none at embeddings that learn."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def rows(lengths: list[int], seed: int) -> Sequences:
    made = comparison.sequences(lengths, seed)
    return Sequences([f"row-{i}" for i in range(len(lengths))], made.ids, made.labels)


def test_operations_are_those_of_the_fine_tune_and_its_measurement():
    model = model_of("llama")
    costs, scored = model_costs(model, 2)
    train, held_out, completions = rows([40] * 4, 1), rows([36] * 3, 2), rows([44] * 2, 3)
    with FlopCounterMode(display=False) as counter:
        held = {
            id(some): [entering_hidden(scored, ids, "eager") for ids in some.input_ids]
            for some in (train, held_out, completions)
        }
        entering = [Entering(some, held[id(some)].__getitem__) for some in (train, held_out, completions)]
        reference = ReferencePredictions(scored, entering[2], "eager", BUDGET)
        fit = Fit([[0, 1], [2, 3], [1, 2]], 1e-3, "eager", BUDGET)
        weights, _ = fine_tune(ScoredWeights(scored), LabelledTokens(entering[0]), fit, lambda steps: None)
        held_out_losses(ScoredWeights(scored), weights, entering[1], fit)
        reference.divergences(ScoredWeights(scored), weights, entering[2])
    lengths = Lengths(*(lengths_of(some.input_ids, some.labels) for some in (train, held_out, completions)))
    planned = trial_flops(costs, TrialSettings(batch_size=2), lengths, 3, len(train), [1.0])
    # Once per trial, the lower layers' pass and the reference's also run the last layers: a tenth of a usual model.
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.35)
    assert planned < counter.get_total_flops()


@pytest.mark.parametrize("train", ["lora", "all"])
@pytest.mark.parametrize("pairs", [False, True])
def test_operations_of_whole_passes_are_those_of_the_fine_tune(train: str, pairs: bool):
    model = model_of("llama")
    costs, scored = model_costs(model, 2)
    learner = EveryWeight(scored) if train == "all" else Adapters(all_layers(model), 4, 0)
    some = rows([40] * 4, 1)
    if pairs:
        objective = MaskedPairs(Entering(some), some.labels, torch.zeros(4), 0.1)
        order = [[0], [1], [1]]
    else:
        objective, order = LabelledTokens(Entering(some)), [[0, 1], [2, 3], [1, 2]]
    with Operations() as counter:
        fine_tune(learner, objective, Fit(order, 1e-3, "eager", BUDGET), lambda steps: None)
    own = TrialSettings(batch_size=1 if pairs else 2, train=train)
    lengths = Lengths(lengths_of(some.input_ids, some.labels), [], [], pairs=pairs)
    planned = trial_flops(costs, own, lengths, 3, 0, [1.0]) - pairs * trial_flops(costs, own, lengths, 0, 0, [0.0])
    assert planned == pytest.approx(counter.total, rel=0.25)
    layers = trial_flops(costs, replace(own, train="layers"), lengths, 3, 0, [1.0])
    assert planned > layers


def test_auto_takes_what_fits_into_the_time_and_never_fewer_than_the_steps_need():
    model = model_of("llama")
    costs, _ = model_costs(model, 2)
    lengths = Lengths([(40, 20)] * 4, [(40, 20)] * 3, [(50, 30)] * 2)
    own, kept = TrialSettings(batch_size=4), [1.0, 0.5] * 6
    much, little = (extent(costs, own, lengths, 10_000, kept, rate) for rate in (1e15, 1.0))
    assert (much.examples, much.steps) == (800, 200) and (little.examples, little.steps) == (80, 20)
    assert extent(costs, own, lengths, 50, kept, 1e15).examples == 50
    rate = extent(costs, own, lengths, 300, kept, 1e15).flops / SECONDS / 1.5
    some = extent(costs, own, lengths, 300, kept, rate)
    assert 80 < some.examples < 300 and some.flops <= SECONDS * rate
    asked = extent(costs, replace(own, examples=64, steps=7), lengths, 300, kept, 1.0)
    assert (asked.examples, asked.steps) == (64, 7)
    assert [steps_of(own, examples) for examples in (1, 100, 10**6)] == [20, 25, 200]

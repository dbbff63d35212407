"""The true cost of leaving a token out of a run, against its unrolled value, on a tiny model in float64."""

import pytest
import torch

from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.simulated import Descent
from benchmarks.leave_one_out import Runs, tokens_of
from tests.maths.comparison import sequences
from tests.maths.tiny_models import model_of


def some(lengths: list[int], seed: int) -> Sequences:
    drawn = sequences(lengths, seed)
    return Sequences([str(i) for i in range(len(lengths))], drawn.ids, drawn.labels)


@pytest.fixture(scope="module")
def runs() -> Runs:
    scored = scored_layers(model_of("gpt2", seed=1), 2)
    return Runs(scored, some([12, 15, 11, 14, 13, 16], 4), some([14, 12, 13], 9), Descent("adam", 2e-4, 3))


def test_the_value_predicts_what_leaving_a_token_out_does(runs):
    order = [[0, 3], [5, 1], [2, 4]]
    values = runs.unrolled(order)
    tokens = tokens_of(runs.train.sequences.batch(), range(6))
    assert sorted(values) == tokens and len(tokens) > 30
    chosen = tokens[::3]
    effects = runs.effects(order, chosen)
    found = torch.tensor([values[token] for token in chosen], dtype=torch.float64)
    assert torch.corrcoef(torch.stack([found, effects]))[0, 1] > 0.9
    # Adam divides by a root of the second moment, which a token's absence lowers as well: the value holds it, so that it
    # says which effect is larger, and makes all of them too large.
    assert 0.1 < float((found @ effects) / (found @ found)) < 1


def test_a_run_without_a_token_that_it_never_meets_is_the_run(runs):
    order = [[0, 3], [5, 1]]
    assert runs.effects(order, [(2, len(runs.train.sequences.input_ids[2]) - 1)]).tolist() == [0.0]

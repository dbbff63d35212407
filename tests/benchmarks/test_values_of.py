"""What the benchmarks take from the valuer, on a tiny model."""

import pytest
import torch

from alphatoken import Directions, TokenValuer
from alphatoken.pipeline.maths.batch import IGNORED, collate
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.outer_sums import OuterSum
from benchmarks.bergson import one_direction
from benchmarks.fidelity import estimates, gradient
from benchmarks.quality.loop import VALIDATION_ROWS, closed_loop
from tests.maths.tiny_models import FAMILIES

ROWS = [([1, 7, 9, 4, 2], [IGNORED, IGNORED, 9, 4, 2]), ([3, 5, 8, 2], [IGNORED, 5, 8, 2])]
NAMES = ("adaptation", "stability")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FAMILIES["llama"].build().double().eval()


@pytest.fixture
def batch():
    return collate([ids for ids, _ in ROWS], [labels for _, labels in ROWS])


def test_every_score_of_the_fidelity_table_is_a_column_at_the_sampled_positions(model, batch):
    scored = scored_layers(model, 3)
    sampled = batch.predicting()[[4, 1]]
    found = estimates(scored, batch, batch, sampled, seed=0)
    total = OuterSum(scored)
    total.positions = batch.predicting()
    ghost_pass(scored, batch, total)
    adaptation = {n: g / 6 for n, g in total.total.items()}
    valuer = TokenValuer(model, Directions(dict.fromkeys(NAMES, adaptation)), 3, 32, exact=True)
    values = {name: column.flatten()[sampled + 1] for name, column in valuer.value(batch).items()}
    for name, column in {
        "ghost, direct": "adaptation_direct",
        "exact over the scored layers": "adaptation_exact",
        "information": "information",
        "entropy": "entropy",
    }.items():
        torch.testing.assert_close(found[name], values[column])
    assert not torch.allclose(found["information, K-FAC"], found["information"])
    assert all(score.shape == (2,) for score in found.values())


def test_one_direction_beside_bergson_is_the_direct_column(model, batch):
    adaptation = gradient(scored_layers(model, 3), batch)
    valuer = TokenValuer(model, Directions(dict.fromkeys(NAMES, adaptation)), 3, 0, scores=["paper"])
    expected = valuer.value(batch)["adaptation_direct"].flatten()[batch.predicting() + 1]
    torch.testing.assert_close(one_direction(model, adaptation)(batch), expected)


def test_the_papers_loop_keeps_its_share_of_every_batch(model, batch):
    relabel = closed_loop(model.float(), ROWS * VALIDATION_ROWS, seed=0, rho=0.5)
    left = relabel(0, batch).labels
    kept = left != IGNORED
    assert int(kept.sum()) == 3  # of 6
    assert torch.equal(left[kept], batch.labels[kept])

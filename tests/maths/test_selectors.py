"""Selectors against their definitions over the whole logits, one example at a time."""

import numpy as np
import pytest
import torch

from alphatoken.pipeline.maths import head
from alphatoken.pipeline.maths.batch import collate
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.selectors import SELECTORS
from alphatoken.pipeline.settings.valuation import METHODS
from tests.maths.tiny_models import COMMON


@pytest.fixture
def models():
    from transformers import LlamaConfig, LlamaForCausalLM

    found = {}
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        found[name] = LlamaForCausalLM(LlamaConfig(**COMMON, initializer_range=0.4)).eval()
    return found


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 61, length).tolist() for length in (5, 19, 12, 1)]
    labels = [[-100] * 2 + row[2:] for row in ids[:3]] + [[-100]]
    labels[1][7:10] = [-100] * 3  # a second turn
    return ids, labels


def select(method, models, rows, seed=0):
    batch = collate(*rows)
    return SELECTORS[method](models, "sdpa", seed)(batch, [f"row-{i}" for i in range(len(rows[0]))]), batch


def definition(model, ids, labels):
    """(loss, entropy) of every token of one example, from the whole logits in plain torch."""
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    loss, entropy = torch.zeros(len(ids)), torch.zeros(len(ids))
    for t in range(1, len(ids)):
        if labels[t] != -100:
            loss[t] = -log_p[t - 1, ids[t]]
            entropy[t] = -(log_p[t - 1].exp() * log_p[t - 1]).sum()
    return loss.detach(), entropy.detach()


def test_every_method_of_the_settings_is_there():
    assert set(METHODS) == {"alphatoken", *SELECTORS}


@pytest.mark.parametrize("method", ["loss", "entropy", "excess_loss"])
def test_scores_and_losses_are_those_of_the_definition(monkeypatch, models, rows, method):
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)  # several chunks of 16 rows
    found, batch = select(method, models, rows)
    assert found["score"].dtype == torch.float32 and found["score"].shape == batch.shape
    for row, (ids, labels) in enumerate(zip(*rows, strict=True)):
        loss, entropy = definition(models["policy"], ids, labels)
        other, _ = definition(models["reference"], ids, labels)
        # Higher is better: likely tokens; undecided places; what the reference knows better than the policy.
        score = {"loss": -loss, "entropy": entropy, "excess_loss": loss - other}[method]
        torch.testing.assert_close(found["score"][row, : len(ids)], score, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["loss"][row, : len(ids)], loss, rtol=1e-4, atol=1e-5)
        assert not found["score"][row, len(ids) :].any() and not found["loss"][row, len(ids) :].any()


def test_random_depends_on_seed_and_id_alone_and_is_uniform(rows):
    found, batch = select("random", {}, rows)
    alone = SELECTORS["random"]({}, "sdpa", 0)(batch.rows(slice(2, 3)), ["row-2"])["score"]
    assert torch.equal(found["score"][2:3, : alone.shape[1]], alone)
    assert not torch.equal(select("random", {}, rows, seed=1)[0]["score"], found["score"])
    assert (found["score"][batch.labels == -100] == 0).all() and not found["loss"].any()
    long = collate([[5] * 4000] * 3, [[5] * 4000] * 3)
    drawn = SELECTORS["random"]({}, "sdpa", 0)(long, ["a", "b", "c"])["score"].numpy()
    assert len(np.unique(drawn)) > 11_900 and drawn.min() >= 0 and drawn.max() < 1
    assert np.histogram(drawn, 10, (0, 1))[0] == pytest.approx(1200, abs=150)
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.05


def test_full_is_zero_everywhere(rows):
    found, batch = select("full", {}, rows)
    assert found["score"].shape == batch.shape and not found["score"].any() and not found["loss"].any()


def test_a_broken_model_is_named_with_example_and_module(models, rows):
    with torch.no_grad():
        models["policy"].model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFinite, match="layers.1.mlp.down_proj") as error:
        select("loss", models, rows)
    assert error.value.row == 0

"""Directions of several tasks in one pass, in float64."""

import pytest
import torch

from alphatoken.pipeline.anchor.objectives import response_tokens, shares_of_adaptation, with_adaptation
from alphatoken.pipeline.maths.batch import Sequences as Rows
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.valuer import TokenValuer
from tests.maths.comparison import sequences, validation_gradient
from tests.maths.tiny_models import model_of

LAYERS, WINDOW = 2, 6


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_each_tasks_columns_are_those_of_its_rows_alone_and_add_up_to_those_of_all(family: str) -> None:
    model = model_of(family, seed=1)
    tasks = {"adaptation_code": sequences([9, 12, 7], 70), "adaptation_maths": sequences([15, 8], 71)}
    rows = {name: Rows([str(i) for i in range(len(one.ids))], one.ids, one.labels) for name, one in tasks.items()}
    named = {name: validation_gradient(model, LAYERS, [one.batch()]) for name, one in tasks.items()}
    shares = shares_of_adaptation({name: response_tokens(one) for name, one in rows.items()})
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) > 0.2
    every = validation_gradient(model, LAYERS, [one.batch() for one in tasks.values()])
    together = with_adaptation(named, shares)
    for name, tensor in together["adaptation"].items():
        torch.testing.assert_close(tensor, every[name], rtol=1e-10, atol=1e-12)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in every.items()}
    batch = sequences([14, 10], 3).batch()
    found = TokenValuer(
        model, Directions({**together, "stability": zeros}), LAYERS, WINDOW, scores=["paper", "information"]
    ).value(batch)
    for task, direction in named.items():
        alone = TokenValuer(
            model, Directions({"adaptation": direction, "stability": zeros}), LAYERS, WINDOW, scores=["paper"]
        ).value(batch)
        for path in ("direct", "causal"):
            wanted = alone[f"adaptation_{path}"]
            assert wanted.any()
            torch.testing.assert_close(
                found[f"{task}_{path}"], wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max())
            )
    for path in ("direct", "causal"):
        total = sum(share * found[f"{task}_{path}"] for task, share in shares.items())
        torch.testing.assert_close(found[f"adaptation_{path}"], total, rtol=1e-9, atol=1e-10)

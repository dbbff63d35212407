"""Every architecture against the pairwise definition, with what is scored and what is left out."""

from __future__ import annotations

import pytest
import torch

from pipeline.maths.decoder import scored_layers
from pipeline.maths.valuer import TokenValuer
from tests.maths.comparison import assert_same, directions, expected, sequences
from tests.maths.tiny_models import FAMILIES, model_of, nearby

LAYERS, WINDOW = 2, 6


@pytest.mark.parametrize("family", FAMILIES)
def test_components_and_loss_equal_the_pairwise_definition(family: str) -> None:
    policy = model_of(family, seed=1)
    reference = nearby(policy, seed=2)
    layout = FAMILIES[family].layout
    train, validation, completions = sequences([13, 6, 10], 3), [sequences([9, 7], 4)], sequences([8, 11], 5)
    valuer = TokenValuer(policy, directions(policy, reference, LAYERS, validation, completions), LAYERS, WINDOW)
    found = valuer.value(train.batch())
    wanted = expected(policy, reference, layout, LAYERS, train, validation, completions, WINDOW)
    assert_same(found, [one.tokens for one in wanted], 1e-9)

"""The passes of a rehearsal: lower layers run once, and a NaN is found all the same."""

import copy
import math

import numpy as np
import pytest
import torch

from alphatoken.pipeline.maths.batch import IGNORED, Batch
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.rehearsal import LANES, RehearsedModel, kept_in_batch, lanes_of
from alphatoken.pipeline.maths.valuer import ALL
from tests.maths.comparison import sequences
from tests.maths.tiny_models import FAMILIES

NAMES = ("adaptation", "stability")


def model_of(family: str) -> torch.nn.Module:
    torch.manual_seed(3)
    return FAMILIES[family].build().eval()


def directions(scored, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {n: {k: torch.randn(w.shape, generator=generator) for k, w in scored.weights().items()} for n in NAMES}


@pytest.mark.parametrize(("scores", "exact"), [(["paper", "loss"], False), (["paper", "loss"], True), (ALL, False)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_lower_layers_run_once_and_other_weights_change_nothing_below(family: str, scores: list, exact: bool) -> None:
    model = model_of(family)
    scored = scored_layers(model, 2)
    other = {name: w + 0.01 * torch.randn_like(w) for name, w in scored.weights().items()}
    rehearsed, batch = RehearsedModel(scored, 4, "sdpa", scores, exact), sequences([9, 14, 6], seed=1).batch()
    masked = Batch(batch.input_ids, batch.labels.clone(), batch.lengths)
    masked.labels[:, ::2] = IGNORED
    valuer = rehearsed.valuer(directions(scored, 5))
    calls: list[int] = []
    attention = next(m for n, m in scored.lower[0].named_modules() if n.endswith(("self_attn", "attn")))
    attention.register_forward_hook(lambda *_: calls.append(1))
    hidden: list[torch.Tensor] = []
    found = rehearsed.values(valuer, other, batch, hidden)
    reused, fresh = OuterSum(scored), OuterSum(scored)
    losses = rehearsed.add_gradient(reused, other, masked, hidden, direction=False)
    assert len(calls) == 1 and len(hidden) == 1
    assert torch.equal(losses, rehearsed.add_gradient(fresh, other, masked, [], direction=False))
    assert len(calls) == 2
    twin = copy.deepcopy(model)
    twin.load_state_dict({**twin.state_dict(), **other})
    own = RehearsedModel(scored_layers(twin, 2), 4, "sdpa", scores, exact)
    plain = own.valuer(directions(scored, 5)).value(batch)
    assert tuple(found) == valuer.columns
    for name, column in found.items():
        assert column.any() and torch.equal(column, plain[name]), name
    for name, total in reused.total.items():
        assert torch.equal(total, fresh.total[name])
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in scored.weights().items())


def test_the_whole_gradient_is_that_of_autograd_and_a_direction_leaves_the_prompt_out() -> None:
    model = model_of("llama")
    scored, batch = scored_layers(model, 2), sequences([9, 14, 6], seed=1).batch()
    rehearsed, whole, direction = (
        RehearsedModel(scored, 4, "sdpa", ["paper", "loss"], False),
        OuterSum(scored),
        OuterSum(scored),
    )
    weights = dict(scored.weights())
    rehearsed.add_gradient(whole, weights, batch, [], direction=False)
    rehearsed.add_gradient(direction, weights, batch, [], direction=True)
    mask = torch.arange(batch.shape[1])[None] < batch.lengths[:, None]
    logits = model(input_ids=batch.input_ids, attention_mask=mask.long()).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    losses.backward()
    for name, total in whole.total.items():
        torch.testing.assert_close(total, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(whole.total[n], t, rtol=1e-2) for n, t in direction.total.items())


def test_a_nan_names_its_example_also_where_lower_layers_are_reused() -> None:
    model = model_of("llama")
    scored, batch = scored_layers(model, 2), sequences([9, 14, 6], seed=1).batch()
    rehearsed, hidden = RehearsedModel(scored, 4, "sdpa", ["paper", "loss"], False), []
    weights = dict(scored.weights())
    rehearsed.add_gradient(OuterSum(scored), weights, batch, hidden, direction=False)
    token = int(batch.input_ids[1, 2])
    assert token not in batch.input_ids[[0, 2]]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    hidden[0][1] = math.nan
    with pytest.raises(NonFinite, match="example 1 of the batch"):
        rehearsed.add_gradient(OuterSum(scored), weights, batch, hidden, direction=False)
    with pytest.raises(NonFinite, match="example 1 of the batch"):
        rehearsed.values(rehearsed.valuer(directions(scored, 5)), weights, batch, hidden)


def test_lanes_depend_on_lengths_alone_and_hold_every_sequence_once() -> None:
    lengths = [5 + (i * 37) % 23 for i in range(64)]
    lanes = lanes_of(lengths, 60)
    assert len(lanes) == LANES and sorted(i for lane in lanes for group in lane for i in group) == list(range(64))
    assert all(max(lengths[i] for i in group) * len(group) <= 60 for lane in lanes for group in lane)
    assert lanes_of([9, 8], 100) == [[[0, 1]]]


def test_a_batch_keeps_its_highest_values_of_both_objectives() -> None:
    columns = {
        "adaptation_direct": np.array([1, 5, 2, 0], np.float32), "adaptation_causal": np.array([0, 0, 2, 0], np.float32),
        "stability_direct": np.array([0, -3, 0, 1], np.float32), "stability_causal": np.array([0, 0, 0, 1], np.float32),
    }  # fmt: skip
    assert kept_in_batch(columns, 0.5, 0.0).tolist() == [False, True, True, False]
    assert kept_in_batch(columns, 0.5, 2.0).tolist() == [False, False, True, True]
    assert kept_in_batch({name: column[:0] for name, column in columns.items()}, 0.5, 1.0).tolist() == []

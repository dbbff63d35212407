"""What forward mode gives: exact columns against plain autograd, one backward pass per token, and against the position-wise
sum; information against one backward pass per token of the vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from alphatoken.pipeline.maths.decoder import UnsupportedModel, scored_layers
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.valuer import ALL, TokenValuer, check_model
from tests.maths.comparison import Sequences, sequences, without_drift
from tests.maths.tiny_models import FAMILIES, model_of

LAYERS, WINDOW = 2, 6
LAYER_NORM = ("gpt2", "gpt_neox")
WITHOUT_INTERFACE = {  # to transformers' attention functions
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=61, hidden_size=24, num_layers=3, num_heads=4, attention_types=[[["global"], 3]],
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        )
    ),
    "mpt": lambda: hf.MptForCausalLM(
        hf.MptConfig(vocab_size=61, d_model=24, n_heads=4, n_layers=3, expansion_ratio=2, max_seq_len=64)
    ),
}  # fmt: skip


def tolerance(family: str) -> float:
    """Root-mean-square norms compute in float32 whatever the model's dtype, and forward mode rounds other products."""
    return 1e-9 if family in LAYER_NORM else 3e-6


def random_directions(model, names=("adaptation", "stability")) -> Directions:
    generator = torch.Generator().manual_seed(7)
    weights = scored_layers(model, LAYERS).weights()
    return Directions(
        {n: {k: torch.randn(w.shape, generator=generator, dtype=w.dtype) for k, w in weights.items()} for n in names}
    )


def one_backward_per_token(model, directions: Directions, some: Sequences) -> list[dict[str, torch.Tensor]]:
    """<gradient of the token's own loss, M> for every response token, by whole-model autograd."""
    scored = scored_layers(model, LAYERS)
    found = []
    for ids, labels in zip(some.ids, some.labels, strict=True):
        columns = {f"{name}_exact": torch.zeros(len(ids), dtype=torch.float64) for name in directions.named}
        columns["loss"] = torch.zeros(len(ids), dtype=torch.float64)
        for t, label in enumerate(labels):
            if label == -100:
                continue
            for parameter in model.parameters():
                parameter.requires_grad_(True)
                parameter.grad = None
            logits = model(input_ids=torch.tensor([ids])).logits[0, t - 1]
            loss = F.cross_entropy(logits, torch.tensor(ids[t]))
            loss.backward()
            columns["loss"][t] = loss.detach()
            for name, direction in directions.named.items():
                products = [
                    (m.parameter.grad * direction[m.name]).sum() for m in scored.maps if m.parameter.grad is not None
                ]
                columns[f"{name}_exact"][t] = torch.stack(products).sum()
        found.append(columns)
    model.requires_grad_(False)
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_tokens_value_is_its_own_gradients_product_with_the_direction(family: str) -> None:
    model, some = model_of(family, seed=1), sequences([9, 6], 3)
    directions = random_directions(model)
    found = TokenValuer(model, directions, LAYERS, WINDOW, scores=["loss"], exact=True).value(some.batch())
    assert tuple(found) == ("loss", "adaptation_exact", "stability_exact")
    relative = tolerance(family)
    for row, wanted in enumerate(one_backward_per_token(model, directions, some)):
        for name, column in wanted.items():
            got = found[name][row, : len(column)]
            assert float(column.abs().max()) > 0
            torch.testing.assert_close(got, column, rtol=relative, atol=relative * float(column.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_information_is_the_expected_square_of_the_product_over_all_labels(family: str) -> None:
    """sum_y p_y <grad log p_y, G>^2, by one backward pass for every token of the vocabulary."""
    model, (ids,) = model_of(family, seed=1), sequences([7], 3).ids
    directions, scored = random_directions(model), scored_layers(model, LAYERS)
    some = Sequences([ids], [[-100] * 3 + ids[3:]])
    found = TokenValuer(model, directions, LAYERS, WINDOW, scores=["information"]).value(some.batch())["information"]
    weights = [m.parameter.requires_grad_(True) for m in scored.maps]
    for t in (3, 6):
        logp = model(input_ids=torch.tensor([ids])).logits[0, t - 1].double().log_softmax(-1)
        expected = 0.0
        for y in range(len(logp)):
            gradients = torch.autograd.grad(logp[y], weights, retain_graph=True, allow_unused=True)
            pairs = [(g, m) for g, m in zip(gradients, scored.maps, strict=True) if g is not None]
            product = sum(float((g * directions.named["adaptation"][m.name]).sum()) for g, m in pairs)
            expected += float(logp[y].detach().exp()) * product**2
        assert expected > 0
        assert float(found[0, t]) == pytest.approx(expected, rel=1e-5)
    assert not found[0, :3].any() and bool((found[0, 3:] > 0).all())


def test_information_does_not_look_at_the_last_label() -> None:
    model, (ids,) = model_of("llama", seed=1), sequences([9], 3).ids
    valuer = TokenValuer(model, random_directions(model), LAYERS, WINDOW)
    one, other = ([[*ids[:-1], last]] for last in (ids[-1], (ids[-1] + 1) % 50))
    values = [valuer.value(Sequences(some, [[-100] * 4 + some[0][4:]]).batch()) for some in (one, other)]
    for name in ("information", "entropy"):
        torch.testing.assert_close(values[0][name], values[1][name], rtol=0, atol=0)
    for name in ("loss", "adaptation_direct", "gradient_norm"):
        assert values[0][name][0, -1] != values[1][name][0, -1]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_and_positions_add_up_to_the_same_number(family: str) -> None:
    """Both split the sequence's gradient: by token, and by position (all positions, prompt included)."""
    model, some = model_of(family, seed=1), sequences([12], 3)
    directions, batch = random_directions(model), some.batch()
    exact = TokenValuer(model, directions, LAYERS, scores=[], exact=True).value(batch)
    paper = TokenValuer(model, directions, LAYERS, window=0, scores=["paper"])
    everywhere = paper.value(batch, positions=torch.arange(batch.shape[1] - 1))
    for name in ("adaptation", "stability"):
        whole, relative = float(exact[f"{name}_exact"].sum()), tolerance(family)
        rounding = relative * float(exact[f"{name}_exact"].abs().max())
        assert whole == pytest.approx(float(everywhere[f"{name}_direct"].sum()), rel=relative, abs=rounding)
        assert whole != pytest.approx(float(paper.value(batch)[f"{name}_direct"].sum()), rel=1e-3)


def test_a_direction_that_goes_nowhere_costs_no_pass() -> None:
    """Of the scored layers one pass per direction, the first of them the pass itself; of the lower ones one in all."""
    model, some = model_of("llama", seed=1), sequences([9], 3)
    both = random_directions(model)
    found = {}
    for directions in (both, without_drift(both.named["adaptation"])):
        passes = {"scored": 0, "lower": 0}

        def count(place: str, passes: dict[str, int] = passes) -> None:
            passes[place] += 1

        valuer = TokenValuer(model, directions, LAYERS, WINDOW, scores=["paper", "information", "loss"], exact=True)
        hooks = [
            valuer.scored.layers[0].register_forward_hook(lambda *_, count=count: count("scored")),
            valuer.scored.lower[0].self_attn.register_forward_hook(lambda *_, count=count: count("lower")),
        ]
        values = valuer.value(some.batch())
        for hook in hooks:
            hook.remove()
        assert passes["lower"] == 1
        found[passes["scored"]] = values
    assert not found[1]["stability_exact"].any() and found[2]["stability_exact"].any()
    for name in ("adaptation_exact", "information", "loss"):
        torch.testing.assert_close(found[1][name], found[2][name], rtol=0, atol=0)


@pytest.mark.parametrize("family", sorted(WITHOUT_INTERFACE))
def test_layers_that_return_tuples_are_handed_through_in_the_second_pass(family: str) -> None:
    model, some = WITHOUT_INTERFACE[family]().double().eval(), sequences([9, 6], 3)
    both = random_directions(model)
    found = TokenValuer(model, both, LAYERS, scores=["loss"], exact=True).value(some.batch())
    for name in both.named:
        others = {other: {key: torch.zeros_like(t) for key, t in both.named[other].items()} for other in both.named}
        alone = Directions({**others, name: both.named[name]})
        wanted = TokenValuer(model, alone, LAYERS, scores=["loss"], exact=True).value(some.batch())[f"{name}_exact"]
        assert wanted.any()
        torch.testing.assert_close(found[f"{name}_exact"], wanted, rtol=0, atol=0)


def test_a_model_without_forward_mode_derivatives_is_refused_with_the_remedy() -> None:
    model = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=61, hidden_size=24, n_head=4, n_layer=3)).eval()
    scored = scored_layers(model, LAYERS)
    with pytest.raises(
        UnsupportedModel, match="forward mode .*: set valuation.scores=.paper,loss,entropy,gradient_norm.$"
    ):
        check_model(scored, ALL, 0, "sdpa")
    with pytest.raises(UnsupportedModel, match="set valuation.scores=.loss. and valuation.exact=false$"):
        check_model(scored, ["loss"], 0, "sdpa", exact=True)
    without = [name for name in ALL if name != "information"]
    check_model(scored, without, 0, "sdpa")
    some = sequences([9], 3).batch()
    found = TokenValuer(model, random_directions(model), LAYERS, window=0, scores=without).value(some)
    assert all(found[name].any() for name in found if not name.endswith("causal"))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_that_can_be_scored_passes_the_check_and_is_left_as_it_was(family: str) -> None:
    model = model_of(family, seed=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    check_model(scored_layers(model, LAYERS), ALL, WINDOW, "sdpa", exact=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_an_unknown_score_is_an_error() -> None:
    model = model_of("llama", seed=1)
    with pytest.raises(
        ValueError, match="scores=other: must be among paper, information, loss, entropy, gradient_norm"
    ):
        TokenValuer(model, random_directions(model), LAYERS, scores=["paper", "other"])

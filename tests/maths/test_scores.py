"""All scores from one pass: each subset gives what all together give, and nothing of a batch or a call stays behind."""

from __future__ import annotations

import copy
import gc
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from alphatoken.data_schemas import COMPONENTS, EXACT, value_columns
from alphatoken.data_schemas import SCORES as COLUMNS_OF
from alphatoken.pipeline.maths import attention_blocks, contraction, head
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.capture import Captured
from alphatoken.pipeline.maths.contraction import Contraction
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.scores import SCORES, HeadScore
from alphatoken.pipeline.maths.valuer import ALL, TokenValuer, needs_directions
from benchmarks.models.weights import randomised
from tests.maths import pairwise
from tests.maths.comparison import Sequences, sequences, state
from tests.maths.tiny_models import COMMON, FAMILIES, LLAMA, model_of

LAYERS, WINDOW = 2, 6
SOME = sequences([11, 6, 9], 3)
SUBSETS = [subset for size in range(1, len(ALL) + 1) for subset in combinations(ALL, size)]


def random_directions(model: nn.Module, seed: int = 7, layers: int = LAYERS) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    weights = scored_layers(model, layers).weights()
    return Directions(
        {
            name: {k: torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w) for k, w in weights.items()}
            for name in ("adaptation", "stability")
        }
    )


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float = 1e-9) -> None:
    for name, column in found.items():
        close = relative * float(wanted[name].abs().max())
        torch.testing.assert_close(column, wanted[name], rtol=relative, atol=close, msg=lambda m, n=name: f"{n}: {m}")


# --- subsets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_combination_of_scores_gives_what_all_together_give(family: str) -> None:
    model, batch = model_of(family, seed=1), SOME.batch()
    directions = random_directions(model)
    together = TokenValuer(model, directions, LAYERS, WINDOW, exact=True).value(batch)
    assert tuple(together) == value_columns(ALL, exact=True) and all(column.any() for column in together.values())
    for subset in [*SUBSETS, ()]:
        for exact in (False, True):
            valuer = TokenValuer(model, directions, LAYERS, WINDOW, scores=subset[::-1], exact=exact)
            assert valuer.columns == value_columns(subset, exact)  # in their own order, whatever was asked for first
            if valuer.columns:
                found = valuer.value(batch)
                assert tuple(found) == valuer.columns
                assert_alike(found, together)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_across_blocks_of_attention_every_column_is_there_alone_as_together(
    monkeypatch: pytest.MonkeyPatch, family: str, kernel: str
) -> None:
    model, batch = model_of(family, seed=1), SOME.batch()
    directions = random_directions(model)
    whole = TokenValuer(model, directions, LAYERS, WINDOW, kernel, exact=True).value(batch)
    monkeypatch.setattr(attention_blocks, "BLOCK", 4)
    assert_alike(TokenValuer(model, directions, LAYERS, WINDOW, kernel, exact=True).value(batch), whole)
    for score in ALL:
        assert_alike(TokenValuer(model, directions, LAYERS, WINDOW, kernel, scores=[score]).value(batch), whole)


def test_a_window_of_nothing_leaves_all_but_the_causal_columns_as_they_are() -> None:
    model, batch = model_of("mistral", seed=1), SOME.batch()
    directions = random_directions(model)
    found = {w: TokenValuer(model, directions, LAYERS, w, exact=True).value(batch) for w in (0, WINDOW)}
    causal = [name for name in found[0] if name.endswith("causal")]
    assert len(causal) == 2 and not any(found[0].pop(name).any() for name in causal)
    assert_alike(found[0], found[WINDOW])


def test_directions_that_no_score_looks_at_do_no_harm_and_their_weights_are_used_all_the_same() -> None:
    """A column means the same whatever else is computed: at the weights that the directions bring."""
    model, batch = model_of("llama", seed=1), SOME.batch()
    directions = random_directions(model)
    moved = {name: w + 0.1 * torch.ones_like(w) for name, w in scored_layers(model, LAYERS).weights().items()}
    for brought in (Directions(directions.named), Directions(directions.named, moved)):
        together = TokenValuer(model, brought, LAYERS, WINDOW).value(batch)
        for scores in (("loss", "entropy"), ("gradient_norm",), ("loss",)):
            assert_alike(TokenValuer(model, brought, LAYERS, WINDOW, scores=scores).value(batch), together)
    plain = TokenValuer(model, None, scores=["loss"]).value(batch)["loss"]
    assert not torch.allclose(plain, together["loss"], rtol=1e-3)


def test_a_direction_that_is_looked_at_and_not_there_is_named() -> None:
    model = model_of("llama")
    alone = Directions({"adaptation": random_directions(model).named["adaptation"]})
    for scores, exact in ((["paper"], False), (ALL, False), ([], True)):
        with pytest.raises(ValueError, match="there is no direction stability"):
            TokenValuer(model, alone, LAYERS, scores=scores, exact=exact)
    batch = SOME.batch()
    without = [score for score in ALL if score != "paper"]
    assert_alike(
        TokenValuer(model, alone, LAYERS, scores=without).value(batch),
        TokenValuer(model, random_directions(model), LAYERS, WINDOW).value(batch),
    )


def test_scores_of_a_narrow_model_are_alike_to_its_rounding() -> None:
    for dtype, relative in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        model, batch = model_of("llama", seed=1, dtype=dtype), SOME.batch()
        directions = random_directions(model)
        together = TokenValuer(model, directions, LAYERS, WINDOW, exact=True).value(batch)
        for score in ALL:
            found = TokenValuer(model, directions, LAYERS, WINDOW, scores=[score]).value(batch)
            assert all(column.dtype == torch.float32 for column in found.values())
            assert_alike(found, together, relative)


# --- heads -----------------------------------------------------------------------------------------------------------


class _Around(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
        self.inner.weight = linear.weight
        self.weight = linear.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden)


def _with_bias() -> nn.Module:
    model: Any = model_of("llama", seed=1)
    model.lm_head = nn.Linear(24, 61, dtype=torch.float64)
    return randomised(model, 1)


def _behind_a_module() -> nn.Module:
    model: Any = model_of("llama", seed=1)
    model.lm_head = _Around(model.lm_head)
    return model


def _scaled() -> nn.Module:
    return randomised(hf.CohereForCausalLM(hf.CohereConfig(**COMMON, logit_scale=0.4)), 1).double()


HEADS = {
    "one matrix": lambda: model_of("llama", seed=1), "soft cap": lambda: model_of("gemma2", seed=1), "scale": _scaled,
    "bias": _with_bias, "behind a module": _behind_a_module,
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_whatever_the_head_information_entropy_and_exact_columns_are_those_of_its_logits(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Against the derivative of the whole model's logits by a backward pass of a backward pass."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)  # several chunks: the first shows whether the head is one matrix
    monkeypatch.setattr(head, "CACHE_BYTES", 61 * 8 * 3)
    model, some = HEADS[kind](), sequences([25, 6, 9], 3)
    directions = random_directions(model)
    found = TokenValuer(model, directions, LAYERS, WINDOW, exact=True).value(some.batch())
    twin = pairwise.oracle(model)
    for row, (ids, labels) in enumerate(zip(some.ids, some.labels, strict=True)):
        matrices = {n: {(k, 0): m.double() for k, m in some.items()} for n, some in directions.named.items()}
        moved = {n: pairwise.moved_logits(twin, LLAMA, LAYERS, ids, m) for n, m in matrices.items()}
        recorded = pairwise.record(twin, LLAMA, LAYERS, ids, labels)
        wanted = pairwise.prediction_values(recorded, moved["adaptation"])
        probability = recorded.log_probability.exp()
        for name, u in moved.items():
            following = u[:-1].gather(1, torch.tensor(ids)[1:, None]).squeeze(1)
            wanted[f"{name}_exact"] = F.pad((probability * u).sum(dim=1)[:-1] - following, (0, 1))
        for name, column in pairwise.token_values(wanted, recorded).items():
            assert column.any()
            scale = float(column.abs().max())
            assert float((found[name][row, : len(ids)] - column).abs().max()) < 1e-6 * scale, name


# --- the registry ----------------------------------------------------------------------------------------------------


def test_schemas_and_engine_name_the_same_scores_and_columns_in_the_same_order() -> None:
    columns = {
        n: tuple(kind.readings) if isinstance(kind, HeadScore) else COMPONENTS if n == "paper" else kind.columns
        for n, kind in SCORES.items()
    }  # what `paper` writes depends on the directions that it is given; test_objectives.py sees all of them
    assert columns.pop("exact") == EXACT
    assert list(columns.items()) == list(COLUMNS_OF.items())
    assert list(SCORES) == [*ALL, "exact"] and tuple(COLUMNS_OF) == ALL


def test_the_settings_know_which_scores_look_at_directions() -> None:
    from alphatoken.pipeline.settings.valuation import DIRECTED

    assert [score for score in ALL if needs_directions([score])] == list(DIRECTED)
    assert needs_directions(["exact"])


# --- experts ---------------------------------------------------------------------------------------------------------


def layer_visitors(scores: tuple[str, ...], chosen: list[int], shape: tuple[int, int]) -> tuple:
    """A mixture's first stack of experts, a pair of directions, and fresh visitors for paper and gradient_norm."""
    model = model_of("mixtral", seed=1)
    directions = random_directions(model, layers=1)
    valuer = TokenValuer(model, directions, 1, window=0, scores=scores)
    linear = next(m for m in valuer.scored.maps if m.experts)
    return linear, directions, [score.visitor(torch.tensor(chosen), shape) for score in valuer.layers]


@pytest.mark.parametrize("scores", [("paper", "gradient_norm"), ALL], ids=["layers alone", "all"])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [2, 0], [3]])
def test_an_expert_that_a_token_picks_twice_counts_twice(chosen: list[int], scores: tuple[str, ...]) -> None:
    """By hand, over rows as an expert sees them: position 2 twice, position 1 never."""
    linear, directions, (paper, norm) = layer_visitors(scores, chosen, (1, 4))
    generator = torch.Generator().manual_seed(0)
    d_out, d_in = linear.parameter.shape[1:]
    rows = torch.tensor([3, 2, 0, 2])
    entering = torch.randn(4, d_in, generator=generator, dtype=torch.float64)
    error = torch.randn(4, d_out, generator=generator, dtype=torch.float64)
    for visitor in (paper, norm):
        visitor(Captured(linear, entering, error, rows, 1, (1, 4), None))
    direct, norms = paper.found()[::2], norm.found()[0]
    for place, position in enumerate(chosen):
        own = [i for i, row in enumerate(rows.tolist()) if row == position]
        for index, name in enumerate(("adaptation", "stability")):
            wanted = sum(float(error[i] @ directions.named[name][linear.name][1] @ entering[i]) for i in own)
            assert float(direct[index, place]) == pytest.approx(wanted, rel=1e-12, abs=1e-15)
        squares = sum(float((error[i] @ error[i]) * (entering[i] @ entering[i])) for i in own)
        assert float(norms[place]) == pytest.approx(squares**0.5, rel=1e-12, abs=1e-15)
    assert not paper.found()[1::2].any()


def test_chunks_of_the_workspace_keep_what_is_picked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for elements in (contraction.WORKSPACE_ELEMENTS, 1):
        monkeypatch.setattr(contraction, "WORKSPACE_ELEMENTS", elements)
        linear, _, (paper, _) = layer_visitors(("paper", "gradient_norm"), [0, 1, 2], (1, 3))
        d_out, d_in = linear.parameter.shape[1:]
        rows = torch.tensor([0, 0, 1, 1, 1, 2])
        paper(Captured(linear, torch.ones(6, d_in).double(), torch.ones(6, d_out).double(), rows, 0, (1, 3), None))
        found.append(paper.found()[::2])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], found[0][:, 2:] * torch.tensor([2.0, 3.0, 1.0]), rtol=1e-12, atol=0)


# --- memory that is used again ---------------------------------------------------------------------------------------


def batches() -> list[Batch]:
    """Small after large, large after small, one without a response."""
    without = Sequences([[3, 4, 5]], [[-100] * 3])
    some = [sequences([40, 33, 21], 1), sequences([4], 2), SOME, without, sequences([37, 40, 12, 9], 5), SOME]
    return [one.batch() for one in some]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_number_of_a_batch_is_left_to_the_next(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """One valuer over batches of different size, against a fresh one for each."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 61 * 8 * 20)
    model = model_of(family, seed=1)
    directions = random_directions(model)

    def fresh() -> TokenValuer:
        return TokenValuer(model, directions, LAYERS, WINDOW, exact=True)

    one = fresh()
    for batch in batches():
        found, wanted = one.value(batch), fresh().value(batch)
        kept = {name: column.clone() for name, column in found.items()}
        for name, column in found.items():
            assert torch.equal(column, wanted[name]), name
        one.value(SOME.batch())
        assert all(torch.equal(column, kept[name]) for name, column in found.items()), "a result was written over"


def test_what_a_batch_leaves_in_the_memory_is_not_seen_by_the_next() -> None:
    """In turn through models of other vocabulary and batches of other lengths; every number is what fresh memory gives."""
    turns = []
    for size, lengths in ((61, [30, 9]), (17, [12, 4]), (90, [20, 11])):
        model = randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**{**COMMON, "vocab_size": size})), 1).double()
        one = TokenValuer(model, random_directions(model), LAYERS, WINDOW, exact=True)
        turns += [(one, sequences(some, size, vocabulary=size).batch()) for some in (lengths, lengths[:1])]
    for one, batch in turns * 2:
        found = one.value(batch)
        head._memories.clear()
        wanted = one.value(batch)
        for name, column in found.items():
            assert torch.equal(column, wanted[name]), name


def test_the_memory_of_a_model_goes_with_it() -> None:
    model = randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON)), 1).double()
    TokenValuer(model, None, scores=["entropy"]).value(sequences([9, 6], 3).batch())
    before = len(head._memories)
    del model
    gc.collect()
    assert len(head._memories) < before


def test_memory_is_not_taken_anew_for_what_fits() -> None:
    memory = head.HeadMemory()
    large = memory.take("p", 8, 5, torch.zeros(1))
    assert large.shape == (8, 5)
    assert memory.take("p", 3, 4, torch.zeros(1)).data_ptr() == large.data_ptr()
    assert memory.take("scratch", 3, 4, torch.zeros(1)).data_ptr() != large.data_ptr()
    assert memory.take("p", 3, 4, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert memory.take("p", 9, 5, torch.zeros(1)).shape == (9, 5)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gemma2"])
def test_a_small_direction_is_not_lost_in_float16(family: str) -> None:
    """Entries of a Fisher drift lie below the least number of float16: values are those of the same direction at a size that
    fits, times the ratio of both, and near those of a float32 model."""
    if family == "mixtral":  # of widths that kernels of 16 bits take, and all experts: rounding must not decide which
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 4}
        wide = randomised(hf.MixtralForCausalLM(hf.MixtralConfig(**{**COMMON, **sizes})), 1).float()
    else:
        wide = model_of(family, seed=1, dtype=torch.float32)
    half = copy.deepcopy(wide).half()
    shrunk = 2.0**-40
    small = {
        direction: {name: tensor * shrunk for name, tensor in tensors.items()}
        for direction, tensors in random_directions(wide).named.items()
    }
    large = {d: {name: tensor / shrunk for name, tensor in tensors.items()} for d, tensors in small.items()}
    assert all(not tensor.half().any() for tensor in small["stability"].values())
    one, other, truth = (
        TokenValuer(model, Directions(named), LAYERS, WINDOW, scores=["paper", "information"], exact=True).value(
            SOME.batch()
        )
        for model, named in ((half, small), (half, large), (wide, large))
    )
    for name in one:
        power = 2 if name == "information" else 1
        assert one[name].any() and torch.equal(one[name] / shrunk**power, other[name]), name
        assert float(F.cosine_similarity(other[name].flatten(), truth[name].flatten(), dim=0)) > 0.98, name


# --- nothing is left in the model ------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


PLACES = {
    "nothing": None,
    "the first scored layer": lambda model: model.model.layers[1],
    "the last layer": lambda model: model.model.layers[2],
    "a lower layer": lambda model: model.model.layers[0],
    "the head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scores", [ALL, ("loss", "entropy"), ("gradient_norm",)], ids=str)
def test_the_model_is_as_before_whatever_is_scored_and_wherever_it_stops(
    family: str, place: str, scores: tuple[str, ...]
) -> None:
    model: Any = model_of(family, seed=1).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    exact = len(scores) > 2
    directions = random_directions(model)
    valuer = TokenValuer(model, directions, LAYERS, WINDOW, scores=scores, exact=exact)
    wanted = valuer.value(SOME.batch())
    calls: list[int] = []

    def stop(*args: object) -> None:
        calls.append(1)
        raise _Stop

    find = PLACES[place]
    for hook in [] if find is None else [find(model)]:
        handle = hook.register_forward_hook(stop)
        before = state(model)
        with pytest.raises(_Stop):
            valuer.value(SOME.batch())
        assert calls and state(model) == before
        handle.remove()
    before = state(model)
    found = valuer.value(SOME.batch())
    assert state(model) == before
    assert all(torch.equal(column, wanted[name]) for name, column in found.items())


def test_the_model_is_as_before_when_a_visitor_stops_a_pass_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = model_of("llama", seed=1).train()
    valuer = TokenValuer(model, random_directions(model), LAYERS, WINDOW, exact=True)
    wanted, before = valuer.value(SOME.batch()), state(model)

    def stop(self: Contraction, captured: Captured) -> None:
        raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(Contraction, "__call__", stop)
        with pytest.raises(_Stop):
            valuer.value(SOME.batch())
    assert state(model) == before
    assert all(torch.equal(column, wanted[name]) for name, column in valuer.value(SOME.batch()).items())


def test_no_parameter_requires_a_gradient_while_a_pass_runs() -> None:
    """And so no weight gradient is formed, by any of the scores."""
    model: Any = model_of("llama", seed=1).requires_grad_(True)
    valuer, seen = TokenValuer(model, random_directions(model), LAYERS, WINDOW, exact=True), []
    hook = model.model.layers[2].mlp.register_forward_hook(
        lambda *_: seen.append(any(parameter.requires_grad for parameter in model.parameters()))
    )
    valuer.value(SOME.batch())
    hook.remove()
    assert seen and not any(seen)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())

"""The engine on a small Llama against the pairwise definition, and everything a caller relies on around it."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from alphatoken.pipeline.maths import contraction, head
from alphatoken.pipeline.maths.attention_blocks import BLOCK, Attended, AttentionBlocks, apply_band
from alphatoken.pipeline.maths.batch import IGNORED, Batch, by_token_budget, collate
from alphatoken.pipeline.maths.capture import Captured, swapped
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.directions import Directions, fisher_drift
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.sampling import sample_completions
from alphatoken.pipeline.maths.valuer import TokenValuer
from alphatoken.pipeline.maths.warmup import schedule, warm_up
from benchmarks.models.weights import randomised
from tests.maths import pairwise
from tests.maths.comparison import (
    COLUMNS,
    LEAST_RELATIVE,
    Expected,
    Sequences,
    assert_same,
    diagonal_fisher,
    directions,
    expected,
    sequences,
    state,
    the_same_twice,
    validation_gradient,
    without_drift,
)
from tests.maths.tiny_models import COMMON, FAMILIES, LLAMA, model_of, nearby

LAYERS, WINDOW = 2, 6
TRAIN = sequences([15, 6, 11, 4], 3)
VALIDATION = [sequences([9, 7], 4), sequences([12], 6)]
COMPLETIONS = sequences([8, 11], 5, gaps=False)


@pytest.fixture(scope="module")
def policy() -> nn.Module:
    return model_of("llama", seed=1)


@pytest.fixture(scope="module")
def reference(policy: nn.Module) -> nn.Module:
    return nearby(policy, seed=2)


@pytest.fixture(scope="module")
def made(policy: nn.Module, reference: nn.Module) -> Directions:
    return directions(policy, reference, LAYERS, VALIDATION, COMPLETIONS)


@pytest.fixture(scope="module")
def wanted(policy: nn.Module, reference: nn.Module) -> list[Expected]:
    return expected(policy, reference, LLAMA, LAYERS, TRAIN, VALIDATION, COMPLETIONS, WINDOW)


@pytest.fixture(scope="module")
def valuer(policy: nn.Module, made: Directions) -> TokenValuer:
    return TokenValuer(policy, made, LAYERS, WINDOW)


def tokens(some: list[Expected]) -> list[dict[str, torch.Tensor]]:
    return [one.tokens for one in some]


# --- the oracle itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_agrees_with_plain_autograd_and_eager_attention(family: str) -> None:
    """(h, d) of the oracle's hooks make autograd's weight gradient; its attention is the model's own."""
    model, layout = model_of(family, seed=1), FAMILIES[family].layout
    some = sequences([13], 3)
    recorded = pairwise.record(pairwise.oracle(model), layout, LAYERS, some.ids[0], some.labels[0])
    for (name, expert), (entering, error) in recorded.seen.items():
        gradient = recorded.gradients[name]
        if gradient.ndim == 3:
            gradient = gradient[expert].T if layout.experts_transposed else gradient[expert]
        gradient = gradient.T if layout.transposed else gradient
        assert torch.allclose(error.T @ entering, gradient, rtol=1e-12, atol=1e-12 * float(gradient.abs().max())), name
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    output = own(input_ids=torch.tensor(some.ids), output_attentions=True)
    for found, theirs in zip(recorded.attention.values(), output.attentions[-LAYERS:], strict=True):
        assert torch.allclose(found, theirs[0].mean(dim=0), atol=1e-6)
    losses = F.cross_entropy(
        output.logits[0, :-1], torch.tensor(some.labels[0][1:]), reduction="none", ignore_index=-100
    )
    for position, loss in recorded.losses.items():
        assert loss == pytest.approx(losses[position].item(), rel=1e-5)


# --- values against the definition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_every_column_in_float64(policy: nn.Module, made: Directions, wanted: list[Expected], kernel: str) -> None:
    assert_same(TokenValuer(policy, made, LAYERS, WINDOW, kernel).value(TRAIN.batch()), tokens(wanted), 1e-9)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_every_column_in_float32(kernel: str) -> None:
    policy = model_of("llama", seed=1, dtype=torch.float32)
    reference = nearby(policy, seed=2)
    made = directions(policy, reference, LAYERS, VALIDATION, COMPLETIONS)
    found = TokenValuer(policy, made, LAYERS, WINDOW, kernel).value(TRAIN.batch())
    assert all(column.dtype == torch.float32 for column in found.values())
    wanted = expected(policy, reference, LLAMA, LAYERS, TRAIN, VALIDATION, COMPLETIONS, WINDOW)
    assert_same(found, tokens(wanted), 1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "phi3"])
def test_bfloat16_runs_and_stays_near(family: str) -> None:
    """bfloat16 through the whole model: float32 columns, finite, and in line with the definition."""
    policy: Any = model_of(family, seed=1, dtype=torch.bfloat16)
    for module in policy.modules():
        if hasattr(module, "top_k"):
            module.top_k = 4  # all experts: rounding must not decide which
    reference = nearby(policy, seed=2)
    made = directions(policy, reference, LAYERS, VALIDATION, COMPLETIONS)
    found = TokenValuer(policy, made, LAYERS, WINDOW).value(TRAIN.batch())
    layout = FAMILIES[family].layout
    wanted = expected(policy, reference, layout, LAYERS, TRAIN, VALIDATION, COMPLETIONS, WINDOW)
    for name in COLUMNS:
        assert found[name].dtype == torch.float32
        own = torch.cat([found[name][i, : len(one.tokens[name])] for i, one in enumerate(wanted)]).double()
        theirs = torch.cat([one.tokens[name] for one in wanted])
        assert float(F.cosine_similarity(own, theirs, dim=0)) > 0.98, name


def test_directions_themselves_are_sums_of_outer_products(policy: nn.Module, reference: nn.Module) -> None:
    twin, old = pairwise.oracle(policy), pairwise.oracle(reference)
    some = [
        pairwise.record(twin, LLAMA, LAYERS, i, t) for p in VALIDATION for i, t in zip(p.ids, p.labels, strict=True)
    ]
    count = sum(len(one.losses) for one in some)
    for name, found in validation_gradient(policy, LAYERS, [p.batch() for p in VALIDATION]).items():
        total = torch.zeros_like(found)
        for one in some:
            entering, error = one.seen[name, 0]
            for v in one.losses:
                total += torch.outer(error[v], entering[v]) / count
        assert torch.allclose(found, total, rtol=1e-9, atol=1e-12)
    pairs = zip(COMPLETIONS.ids, COMPLETIONS.labels, strict=True)
    slow = pairwise.fisher([pairwise.record(old, LLAMA, LAYERS, ids, labels) for ids, labels in pairs])
    for name, found in diagonal_fisher(reference, LAYERS, COMPLETIONS).items():
        assert torch.allclose(found, slow[name, 0], rtol=1e-9, atol=1e-15)


def test_fisher_drift_is_elementwise_in_float32() -> None:
    fisher, new, old = (torch.randn(3, 4, dtype=torch.bfloat16) for _ in range(3))
    drift = fisher_drift(fisher, new, old)
    assert drift.dtype == torch.float32
    assert torch.equal(drift, fisher.float() * (new.float() - old.float()))


def test_a_direction_of_its_own_gives_its_own_columns(policy: nn.Module, made: Directions, valuer: TokenValuer) -> None:
    """The paper's values are linear in the direction, information is quadratic, and zeros give zero."""
    one, two = made.named["adaptation"], made.named["stability"]
    mixed = {name: one[name] + 1.5 * two[name] for name in one}
    apart = valuer.value(TRAIN.batch())
    found = TokenValuer(policy, without_drift(mixed), LAYERS, WINDOW).value(TRAIN.batch())
    other = TokenValuer(policy, Directions({"adaptation": two, "stability": mixed}), LAYERS, WINDOW).value(
        TRAIN.batch()
    )
    for part in ("direct", "causal"):
        sums = apart[f"adaptation_{part}"] + 1.5 * apart[f"stability_{part}"]
        assert torch.allclose(found[f"adaptation_{part}"], sums, rtol=1e-10, atol=1e-12)
        assert torch.allclose(other[f"adaptation_{part}"], apart[f"stability_{part}"], rtol=1e-10, atol=1e-12)
        assert torch.allclose(other[f"stability_{part}"], sums, rtol=1e-10, atol=1e-12)
        assert not found[f"stability_{part}"].any()
    twice = without_drift({name: 2 * tensor for name, tensor in one.items()})
    quadratic = TokenValuer(policy, twice, LAYERS, WINDOW, scores=["information"]).value(TRAIN.batch())["information"]
    assert torch.allclose(quadratic, 4 * apart["information"], rtol=1e-9, atol=0)
    nowhere = without_drift({name: torch.zeros_like(tensor) for name, tensor in one.items()})
    still = TokenValuer(policy, nowhere, LAYERS, WINDOW).value(TRAIN.batch())
    assert not any(still[name].any() for name in COLUMNS[:5])
    for name in ("loss", "entropy", "gradient_norm"):
        assert torch.allclose(still[name], apart[name], rtol=1e-12, atol=0)


# --- identities ----------------------------------------------------------------------------------------------------


def test_direct_values_of_all_positions_sum_to_the_sequence_gradient(
    policy: nn.Module, made: Directions, valuer: TokenValuer, wanted: list[Expected]
) -> None:
    """Sum over ALL real positions = <gradient of the sequence's summed loss, direction>."""
    batch = TRAIN.batch()
    found = valuer.value(batch, batch.real())
    for row, one in enumerate(wanted):
        for name in ("adaptation", "stability"):
            product = sum((one.recorded.gradients[n] * m).sum() for n, m in made.named[name].items())
            assert float(found[f"{name}_direct"][row].sum()) == pytest.approx(float(product), rel=1e-9)


def test_values_of_chosen_positions_stand_at_the_following_index(valuer: TokenValuer, wanted: list[Expected]) -> None:
    """Those of the scored layers; what is read off the softmax is said of the response whatever is chosen."""
    batch = TRAIN.batch()
    found, plain = valuer.value(batch, batch.real()), valuer.value(batch)
    for name in ("information", "loss", "entropy"):
        assert torch.equal(found[name], plain[name])
    for row, one in enumerate(wanted):
        for name in (*COLUMNS[:4], "gradient_norm"):
            positions = one.positions[name]
            kept = positions[:-1]  # the last position predicts nothing: its value is zero
            assert torch.allclose(
                found[name][row, 1 : len(positions)], kept, rtol=1e-9, atol=1e-9 * float(kept.abs().max())
            )
            assert positions[-1] == 0


def test_a_shift_by_one_would_be_seen(valuer: TokenValuer, wanted: list[Expected]) -> None:
    found = valuer.value(TRAIN.batch())
    for shift in (-1, 1):
        moved = {name: torch.roll(column, shift, dims=1) for name, column in found.items()}
        for name in COLUMNS:
            with pytest.raises(AssertionError, match=name):
                assert_same({**found, name: moved[name]}, tokens(wanted), 1e-2)


def test_the_loss_column_is_the_cross_entropy_of_the_token_at_its_index(policy: nn.Module, valuer: TokenValuer) -> None:
    found = valuer.value(TRAIN.batch())["loss"]
    for row, (ids, labels) in enumerate(zip(TRAIN.ids, TRAIN.labels, strict=True)):
        log_probability = policy(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for t, label in enumerate(labels):
            loss = -log_probability[t - 1, ids[t]].item() if label != IGNORED else 0.0
            assert float(found[row, t]) == pytest.approx(loss, rel=1e-6)


def test_values_are_zero_outside_the_response(valuer: TokenValuer) -> None:
    """And nowhere else, but for the causal value of a last token: no error comes after its position."""
    batch = TRAIN.batch()
    response = batch.labels != IGNORED
    followed = response & (torch.arange(batch.shape[1]) < batch.lengths[:, None] - 1)
    for name, column in valuer.value(batch).items():
        assert torch.equal(column != 0, followed if name.endswith("causal") else response), name


def test_a_first_token_has_no_prediction_and_no_value(valuer: TokenValuer) -> None:
    labelled = Sequences(TRAIN.ids, [list(ids) for ids in TRAIN.ids])
    for column in valuer.value(labelled.batch()).values():
        assert not column[:, 0].any()
        assert column[:, 1:3].all()


def test_a_row_and_a_batch_without_a_response_have_no_values(valuer: TokenValuer) -> None:
    some = Sequences(TRAIN.ids, [TRAIN.labels[0], *([IGNORED] * len(ids) for ids in TRAIN.ids[1:])])
    alone = valuer.value(some.batch().rows(slice(0, 1)))
    for name, column in valuer.value(some.batch()).items():
        assert not column[1:].any()
        assert torch.allclose(column[:1], alone[name], rtol=1e-10, atol=1e-12)
    for name, column in valuer.value(some.batch().rows(slice(1, None))).items():
        assert column.shape == (3, 11), name
        assert not column.any()


# --- padding and batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(valuer: TokenValuer, wanted: list[Expected], side: str) -> None:
    length = 17
    ids, labels, mask = [], [], []
    for one, its in zip(TRAIN.ids, TRAIN.labels, strict=True):
        fill = length - len(one)
        before, after = (fill, 0) if side == "left" else (0, fill)
        ids.append([5] * before + one + [5] * after)
        labels.append([7] * before + its + [7] * after)  # labels on padding are no response
        mask.append([0] * before + [1] * len(one) + [0] * after)
    found = valuer(torch.tensor(ids), torch.tensor(mask), torch.tensor(labels))
    assert_same(found, tokens(wanted), 1e-9, left=side == "left")


def test_padding_on_both_sides_and_without_a_mask(valuer: TokenValuer, wanted: list[Expected]) -> None:
    ids = torch.tensor([[0, 0, *TRAIN.ids[0], 0], [0, *TRAIN.ids[2], 0, 0, 0, 0, 0, 0]])
    labels = torch.full_like(ids, IGNORED)
    labels[0, 2:17], labels[1, 1:12] = torch.tensor(TRAIN.labels[0]), torch.tensor(TRAIN.labels[2])
    mask = torch.zeros_like(ids)
    mask[0, 2:17], mask[1, 1:12] = 1, 1
    found = valuer(ids, mask, labels)
    plain = valuer(torch.tensor(TRAIN.ids[:1]), None, torch.tensor(TRAIN.labels[:1]))
    for name in COLUMNS:
        one, two = wanted[0].tokens[name], wanted[2].tokens[name]
        close = {"rtol": 1e-8, "atol": max(1e-9, LEAST_RELATIVE.get(name, 0)) * float(one.abs().max())}
        assert torch.allclose(found[name][0, 2:17], one, **close)
        assert torch.allclose(found[name][1, 1:12], two, **close)
        assert torch.allclose(plain[name][0], one, **close)


def test_holes_in_the_mask_and_empty_rows_are_errors(valuer: TokenValuer) -> None:
    ids = torch.tensor([TRAIN.ids[0][:6]])
    for mask in ([1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]):
        with pytest.raises(ValueError, match="attention_mask"):
            valuer(ids, torch.tensor([mask]), ids)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "qwen3_moe", "gpt_oss"])
def test_values_do_not_depend_on_the_batch(family: str) -> None:
    """Alone, in another order, with other company, with more padding: the same values."""
    policy = model_of(family, seed=1)
    some = sequences([15, 6, 11, 9], 3)
    gradient = validation_gradient(policy, LAYERS, [VALIDATION[0].batch()])
    valuer = TokenValuer(policy, the_same_twice(gradient), LAYERS, WINDOW)
    together = valuer.value(some.batch())
    order = [2, 0, 3, 1]
    mixed = valuer.value(some.batch().rows(torch.tensor(order)))
    companion = sequences([21], 8)
    for row, length in enumerate([15, 6, 11, 9]):
        alone = valuer.value(some.batch().rows(slice(row, row + 1)))
        pair = valuer.value(collate([*companion.ids, some.ids[row]], [*companion.labels, some.labels[row]]))
        for name, column in together.items():
            close = {"rtol": 1e-8, "atol": 1e-9 * float(column.abs().max())}
            own = column[row, :length]
            assert torch.allclose(own, alone[name][0], **close)
            assert torch.allclose(own, mixed[name][order.index(row), :length], **close)
            assert torch.allclose(own, pair[name][1, :length], **close)


def test_chunks_of_logits_and_of_the_workspace_change_nothing(
    valuer: TokenValuer, wanted: list[Expected], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    monkeypatch.setattr(contraction, "WORKSPACE_ELEMENTS", 200)
    batch = TRAIN.batch()
    assert len(batch.predicting()) > head.chunk_rows(valuer.scored.model, torch.zeros(1, dtype=torch.float64))
    assert_same(valuer.value(batch), tokens(wanted), 1e-9)


def test_chunks_of_the_workspace_with_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model_of("qwen3_moe", seed=1)
    gradient = validation_gradient(policy, LAYERS, [VALIDATION[0].batch()])
    valuer = TokenValuer(policy, the_same_twice(gradient), LAYERS, WINDOW)
    whole = valuer.value(TRAIN.batch())
    monkeypatch.setattr(contraction, "WORKSPACE_ELEMENTS", 100)
    for name, column in valuer.value(TRAIN.batch()).items():
        assert torch.allclose(column, whole[name], rtol=1e-9, atol=1e-12)


def test_a_head_that_is_one_matrix_and_one_that_is_not_give_what_autograd_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for family, plain in (("llama", True), ("gemma2", False), ("gpt2", True)):
        policy = model_of(family, seed=1, dtype=torch.float64).requires_grad_(False)
        scored, batch = scored_layers(policy, LAYERS), sequences([15, 6, 11], 3).batch()
        monkeypatch.setattr(head, "CHUNK_BYTES", 1)
        monkeypatch.setattr(head, "CACHE_BYTES", 61 * 8 * 3)
        positions = batch.predicting()
        outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
        hidden, targets = outputs.last_hidden_state.flatten(0, 1)[positions], batch.labels.flatten()[positions + 1]
        assert (head.matrix_of(scored, outputs, hidden) is not None) == plain
        (losses,), gradient = head.read_head(scored, outputs, hidden, targets, [head.Predictions.losses])
        leaf = hidden.detach().requires_grad_(True)
        with head.head_of(scored, outputs) as function:
            wanted = F.cross_entropy(function(leaf), targets, reduction="none")
        assert torch.allclose(losses, wanted, rtol=1e-12, atol=1e-14)
        assert torch.allclose(gradient, torch.autograd.grad(wanted.sum(), leaf)[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_of_16_bits_are_read_in_float32_and_their_errors_rounded_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = model_of(family, seed=1, dtype=torch.bfloat16).requires_grad_(False)
    scored, batch = scored_layers(policy, LAYERS), sequences([25, 16, 21], 3).batch()
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    monkeypatch.setattr(head, "CACHE_BYTES", 61 * 4 * 3)  # chunks of several pieces
    positions = batch.predicting()
    outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
    hidden, targets = outputs.last_hidden_state.flatten(0, 1)[positions], batch.labels.flatten()[positions + 1]
    (losses,), gradient = head.read_head(scored, outputs, hidden, targets, [head.Predictions.losses])
    (again,), _ = head.read_head(scored, outputs, hidden, targets, [head.Predictions.losses], backward=False)
    leaf = hidden.detach().requires_grad_(True)
    with head.head_of(scored, outputs) as function:
        logits = function(leaf)
    wide = logits.float()
    assert torch.equal(losses, again) and losses.dtype == torch.float32
    assert torch.allclose(losses, F.cross_entropy(wide, targets, reduction="none"), rtol=1e-5, atol=1e-6)
    errors = (wide.softmax(dim=-1) - F.one_hot(targets, wide.shape[1])).bfloat16()
    wanted = torch.autograd.grad(logits, leaf, errors)[0]
    assert (gradient - wanted).float().norm() < 1e-2 * wanted.float().norm()


@pytest.mark.parametrize("derived", [False, True])
def test_a_head_that_is_one_matrix_goes_through_the_model_once(derived: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a derivative is read: the first positions of the first batch show what the head is."""
    policy = model_of("llama", seed=1, dtype=torch.float64).requires_grad_(False)
    scored, batch = scored_layers(policy, LAYERS), sequences([25, 16, 21], 3).batch()
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    positions = batch.predicting()
    outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
    hidden, targets = outputs.last_hidden_state.flatten(0, 1)[positions], batch.labels.flatten()[positions + 1]
    calls = []
    policy.register_forward_pre_hook(lambda *_: calls.append(1))
    moved = {"adaptation": torch.ones_like(hidden)} if derived else {}
    first, again = (
        head.read_head(scored, outputs, hidden, targets, [head.Predictions.losses], moved) for _ in range(2)
    )
    assert len(targets) > 2 * head.PROBE_ROWS and len(calls) == 1
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))  # whichever batch is the first


def test_what_a_head_is_is_asked_anew_of_another_model_and_not_of_no_positions() -> None:
    capped, plain = (model_of(name, seed=1, dtype=torch.float64).requires_grad_(False) for name in ("gemma2", "llama"))
    for policy, wanted in ((capped, False), (plain, True), (capped, False)):
        scored, batch = scored_layers(policy, LAYERS), sequences([9, 6], 3).batch()
        outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
        hidden = outputs.last_hidden_state.flatten(0, 1)
        assert head.matrix_of(scored, outputs, hidden[:0]) is None
        assert (head.matrix_of(scored, outputs, hidden) is not None) == wanted


def test_a_hook_that_comes_later_is_heeded() -> None:
    """What has been seen of a head is what its module was; hooks that were hung on since then change it."""
    policy = model_of("llama", seed=1, dtype=torch.float64).requires_grad_(False)
    scored, batch = scored_layers(policy, LAYERS), sequences([9, 6], 3).batch()
    outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
    hidden = outputs.last_hidden_state.flatten(0, 1).detach()
    assert torch.allclose(head.logits_of(scored, outputs, hidden), hidden @ policy.lm_head.weight.T)
    policy.lm_head.register_forward_hook(lambda module, args, output: 3 * output)
    assert torch.allclose(head.logits_of(scored, outputs, hidden), 3 * hidden @ policy.lm_head.weight.T)


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_a_head_that_something_stands_around_goes_through_autograd(how: str) -> None:
    """The output's memory does not tell: a hook or a forward of its own may have made it."""
    policy = model_of("llama", seed=1, dtype=torch.float64).requires_grad_(False)
    scored, batch = scored_layers(policy, LAYERS), sequences([9, 6], 3).batch()
    module, positions = policy.get_output_embeddings(), batch.predicting()
    if how == "hook":
        module.register_forward_hook(lambda module, args, output: 3 * output)
    else:
        module.forward = lambda hidden: 3 * F.linear(hidden, module.weight)
    outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
    hidden, targets = outputs.last_hidden_state.flatten(0, 1)[positions], batch.labels.flatten()[positions + 1]
    (losses,), gradient = head.read_head(scored, outputs, hidden, targets, [head.Predictions.losses])
    leaf = hidden.detach().requires_grad_(True)
    wanted = F.cross_entropy(3 * F.linear(leaf, module.weight), targets, reduction="none")
    assert torch.allclose(losses, wanted, rtol=1e-12, atol=1e-14)
    assert torch.allclose(gradient, torch.autograd.grad(wanted.sum(), leaf)[0], rtol=1e-10, atol=1e-14)


# --- the window ----------------------------------------------------------------------------------------------------


def test_window_zero_leaves_the_causal_path_out(policy: nn.Module, made: Directions, valuer: TokenValuer) -> None:
    found, apart = TokenValuer(policy, made, LAYERS, 0).value(TRAIN.batch()), valuer.value(TRAIN.batch())
    for name in ("adaptation", "stability"):
        assert not found[f"{name}_causal"].any()
        assert torch.allclose(found[f"{name}_direct"], apart[f"{name}_direct"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 14, 1000])
def test_windows_from_one_to_beyond_the_length(
    policy: nn.Module, reference: nn.Module, made: Directions, window: int
) -> None:
    wanted = expected(policy, reference, LLAMA, LAYERS, TRAIN, VALIDATION, COMPLETIONS, window)
    assert_same(TokenValuer(policy, made, LAYERS, window).value(TRAIN.batch()), tokens(wanted), 1e-9)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_the_window_reaches_across_blocks(family: str, kernel: str) -> None:
    """More than two blocks, with a sliding attention window that ends inside a block where there is one."""
    layout = FAMILIES[family].layout
    config = FAMILIES[family].build().config
    config.max_position_embeddings = 512
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = 150 if family == "mistral" else 20
    policy: Any = randomised(type(FAMILIES[family].build())(config), 1).double()
    if layout.experts is not None:
        policy.set_experts_implementation("eager")
    length = 2 * BLOCK + 44
    ids = sequences([length], 3).ids[0]
    labels = [t if i % 40 < 3 or 120 < i < 140 or i > length - 5 else IGNORED for i, t in enumerate(ids)]
    validation = Sequences([sequences([5], 4).ids[0]], [[IGNORED] * 2 + sequences([5], 4).ids[0][2:]])
    train = Sequences([ids, ids[:140]], [labels, labels[:140]])
    gradient = validation_gradient(policy, 1, [validation.batch()])
    found = TokenValuer(policy, the_same_twice(gradient), 1, 32, kernel).value(train.batch())
    twin = pairwise.oracle(policy)
    (against,) = (
        pairwise.record(twin, layout, 1, i, t) for i, t in zip(validation.ids, validation.labels, strict=True)
    )
    drift = {key: torch.zeros(d.shape[1], h.shape[1], dtype=torch.float64) for key, (h, d) in against.seen.items()}
    for row in range(2):
        one = pairwise.record(twin, layout, 1, train.ids[row], train.labels[row])
        kept = {
            key: pair for key, pair in one.seen.items() if key[0] in one.attention
        }  # the causal path alone, for speed
        causal = replace(one, seen=kept)
        wanted = pairwise.position_values(twin.config, layout, causal, [against], drift, 32)
        for name, column in pairwise.token_values({"adaptation_causal": wanted["adaptation_causal"]}, one).items():
            error = (found[name][row, : len(column)] - column).abs().max() / column.abs().max()
            assert float(error) < 1e-9, name


def test_the_band_is_the_attention_matrix_within_the_window() -> None:
    generator = torch.Generator().manual_seed(0)
    length, window = 300, 32
    query = torch.randn(2, 4, length, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, length, 8, generator=generator, dtype=torch.float64)
    scores = Attended(query, key, key, None, None, None, 0.5, None, None, True)
    found = torch.zeros(2, length, length, dtype=torch.float64)
    band = AttentionBlocks(scores, None).band(window)
    for block in band:
        found[:, block.start : block.stop, block.first : block.stop] += block.probability
    logits = query @ key.repeat_interleave(2, dim=1).mT * 0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    full = logits.masked_fill(distance < 0, -math.inf).softmax(-1).mean(1)
    assert torch.allclose(found, full.masked_fill((distance <= 0) | (distance > window), 0), atol=1e-14)
    error = torch.randn(2, length, 5, generator=generator, dtype=torch.float64)
    assert torch.allclose(apply_band(band, error), found.mT @ error, atol=1e-12)


# --- directions ----------------------------------------------------------------------------------------------------


def without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, r"missing \['model.layers.1.self_attn.q_proj.weight'\], unknown \[\].*another valuation.layers"),
        (lambda t: {**t, "other.weight": torch.zeros(1)}, r"missing \[\], unknown \['other.weight'\]"),
        (
            lambda t: {n: m.T if "up_proj" in n else m for n, m in t.items()},
            r"up_proj.* \(24, 36\), the weight \(36, 24\)",
        ),
    ],
)
def test_directions_for_other_layers_are_an_error(
    policy: nn.Module, made: Directions, change: Callable[[Any], Any], message: str
) -> None:
    spoilt = Directions({"adaptation": made.named["adaptation"], "stability": change(made.named["stability"])})
    with pytest.raises(ValueError, match="direction stability.*" + message):
        TokenValuer(policy, spoilt, LAYERS, WINDOW)
    weights = scored_layers(policy, LAYERS).weights()
    with pytest.raises(ValueError, match="policy.*" + message):
        TokenValuer(policy, Directions(made.named, change(weights)), LAYERS, WINDOW)


def test_directions_of_fewer_layers_are_an_error(policy: nn.Module, made: Directions) -> None:
    with pytest.raises(ValueError, match="missing.*layers.0"):
        TokenValuer(policy, made, LAYERS + 1, WINDOW)


def test_directions_are_loaded_from_a_directory(made: Directions, tmp_path: Any) -> None:
    safetensors.torch.save_file(dict(made.named["adaptation"]), tmp_path / "adaptation.safetensors")
    with pytest.raises(FileNotFoundError, match="no stability.safetensors"):
        Directions.load(tmp_path)
    safetensors.torch.save_file(dict(made.named["stability"]), tmp_path / "stability.safetensors")
    assert Directions.load(tmp_path).weights is None
    safetensors.torch.save_file(dict(made.named["adaptation"]), tmp_path / "policy.safetensors")
    loaded = Directions.load(tmp_path)
    for name, tensor in made.named["adaptation"].items():
        assert torch.equal(loaded.named["adaptation"][name], tensor)
        assert torch.equal(loaded.weights[name], tensor)  # type: ignore[index]


# --- weights of a trajectory ---------------------------------------------------------------------------------------


def test_brought_weights_equal_the_same_weights_in_the_model(policy: nn.Module, made: Directions) -> None:
    moved = {
        n: w + 0.2 * torch.randn(w.shape, dtype=w.dtype) for n, w in scored_layers(policy, LAYERS).weights().items()
    }
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    found = TokenValuer(policy, Directions(made.named, moved), LAYERS, WINDOW).value(TRAIN.batch())
    twin = copy.deepcopy(policy)
    twin.load_state_dict(moved, strict=False)
    wanted = TokenValuer(twin, made, LAYERS, WINDOW).value(TRAIN.batch())
    plain = TokenValuer(policy, made, LAYERS, WINDOW).value(TRAIN.batch())
    for name, column in found.items():
        assert torch.allclose(column, wanted[name], rtol=1e-12, atol=0)
        assert not torch.allclose(column, plain[name], rtol=1e-2)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name])


def test_swapped_weights_go_back_after_an_error(policy: nn.Module) -> None:
    scored = scored_layers(policy, LAYERS)
    pointers = [m.parameter.data_ptr() for m in scored.maps]
    with pytest.raises(RuntimeError, match="stop"), swapped(scored, {n: w + 1 for n, w in scored.weights().items()}):
        assert scored.maps[0].parameter.data_ptr() != pointers[0]
        raise RuntimeError("stop")
    assert [m.parameter.data_ptr() for m in scored.maps] == pointers


# --- NaN and infinity ----------------------------------------------------------------------------------------------


def poisoned(change: Callable[[Any], None], row: int, where: str) -> None:
    policy = model_of("llama", seed=1)
    gradient = validation_gradient(policy, LAYERS, [VALIDATION[0].batch()])
    valuer = TokenValuer(policy, the_same_twice(gradient), LAYERS, WINDOW)
    ids = [[3, 4, 5, 6, 7], [3, 4, 5], [8, 9, 60, 10, 11, 12], [8, 9]]
    with torch.no_grad():
        change(policy)
    before = state(policy)
    with pytest.raises(NonFinite, match=where) as raised:
        valuer.value(collate(ids, [[IGNORED, *one[1:]] for one in ids]))
    assert raised.value.row == row
    assert f"example {row} of the batch" in str(raised.value)
    assert state(policy) == before


def set_to(name: str, index: Any, value: float = math.nan) -> Callable[[Any], None]:
    def change(policy: Any) -> None:
        policy.get_parameter(name)[index] = value

    return change


def test_a_nan_embedding_names_the_row_and_the_embedding() -> None:
    poisoned(set_to("model.embed_tokens.weight", 60), 2, "the output of model.embed_tokens")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_spoilt_weight_names_where_it_first_shows(value: float) -> None:
    for layer, module in ((2, "mlp.up_proj"), (2, "mlp.down_proj"), (1, "self_attn.v_proj"), (0, "mlp.gate_proj")):
        name = f"model.layers.{layer}.{module}"
        poisoned(set_to(f"{name}.weight", (0, 0), value), 0, f"the output of {name}")


def test_a_spoilt_head_is_named() -> None:
    poisoned(set_to("lm_head.weight", (5, 0)), 0, "the output of lm_head")


def test_a_gradient_that_overflows_is_named() -> None:
    def change(policy: Any) -> None:
        for parameter in policy.parameters():
            parameter.mul_(1e-3)
        policy.get_parameter("model.norm.weight").mul_(1e3)
        policy.get_parameter("lm_head.weight").mul_(1e306)

    poisoned(change, 0, "the gradient of model.layers.2.mlp.down_proj")


def test_a_nan_direction_is_named(policy: nn.Module, made: Directions) -> None:
    spoilt = {n: torch.full_like(t, math.nan) for n, t in made.named["adaptation"].items()}
    batch = TRAIN.batch()
    batch.labels[0] = IGNORED  # every example with a response has such values
    with pytest.raises(NonFinite, match="the products with the directions .* of example 1"):
        TokenValuer(policy, the_same_twice(spoilt), LAYERS, WINDOW).value(batch)


# --- the model is left as it was -----------------------------------------------------------------------------------


class _Stop(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("broken", ["no", "forward", "head", "visitor"])
def test_the_model_is_as_before_after_a_call(family: str, training: bool, broken: str) -> None:
    policy: Any = model_of(family, seed=1)
    gradient = validation_gradient(policy, LAYERS, [VALIDATION[0].batch()])
    valuer = TokenValuer(policy, the_same_twice(gradient), LAYERS, WINDOW)
    policy.train(training)
    policy.model.layers[1].train(not training)
    policy.model.embed_tokens.weight.requires_grad_(False)
    policy.model.layers[2].self_attn.q_proj.weight.requires_grad_(False)

    def stop(*args: object) -> None:
        raise _Stop

    hook = {"forward": policy.model.layers[2], "head": policy.lm_head}.get(broken)
    handle = hook.register_forward_hook(stop) if hook is not None else None
    before = state(policy)
    if broken == "no":
        valuer.value(TRAIN.batch())
    elif broken == "visitor":
        with pytest.raises(_Stop):
            ghost_pass(valuer.scored, TRAIN.batch(), stop, "sdpa", WINDOW)
    else:
        with pytest.raises(_Stop):
            valuer.value(TRAIN.batch())
    assert state(policy) == before
    if handle is not None:
        handle.remove()


def test_making_a_valuer_leaves_the_model_as_it_was(made: Directions) -> None:
    policy = model_of("llama", seed=1).train()
    policy.set_attn_implementation("eager")
    policy(input_ids=torch.tensor(TRAIN.ids[:1]))
    before = state(policy)
    TokenValuer(policy, made, LAYERS, WINDOW)
    assert state(policy) == before


def test_dropout_of_a_model_in_training_mode_is_off(made: Directions, wanted: list[Expected]) -> None:
    policy = model_of("llama", seed=1)
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.train()
    assert_same(TokenValuer(policy, made, LAYERS, WINDOW).value(TRAIN.batch()), tokens(wanted), 1e-9)
    assert policy.training


def test_a_forward_of_the_decoders_own_survives(made: Directions, wanted: list[Expected]) -> None:
    """accelerate sets `forward` on modules that it dispatches over devices."""
    policy: Any = model_of("llama", seed=1)
    original, calls = policy.model.forward, []

    def dispatched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    policy.model.forward = dispatched
    assert_same(TokenValuer(policy, made, LAYERS, WINDOW).value(TRAIN.batch()), tokens(wanted), 1e-9)
    assert policy.model.forward is dispatched
    # Two short passes show what is scored, one finds the value projections, one scores; the head does not run it again.
    assert len(calls) == 4


def test_two_models_in_two_threads_do_not_meet(made: Directions, wanted: list[Expected]) -> None:
    found: dict[int, dict[str, torch.Tensor]] = {}

    def work(index: int) -> None:
        valuer = TokenValuer(model_of("llama", seed=1), made, LAYERS, WINDOW if index else 0)
        for _ in range(3):
            found[index] = valuer.value(TRAIN.batch())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(found[1], tokens(wanted), 1e-9)
    assert not found[0]["adaptation_causal"].any()


# --- warm-up -------------------------------------------------------------------------------------------------------


def batches() -> list[Batch]:
    return [sequences([14, 9, 5], seed).batch() for seed in (11, 12)] * 6


def plain_training(model: Any, scored: set[str], some: list[Batch], learning_rate: float) -> list[float]:
    """The same warm-up in a plain torch loop; returns the loss before every step."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in scored)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    losses, rise = [], max(1, len(some) // 10)
    for step, batch in enumerate(some):
        mask = torch.arange(batch.shape[1])[None] < batch.lengths[:, None]
        logits = model(input_ids=batch.input_ids, attention_mask=mask.long()).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - rise) / (len(some) - rise)))
        optimizer.param_groups[0]["lr"] = learning_rate * ((step + 1) / rise if step < rise else cosine)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("gpt2", torch.float32), ("llama", torch.float64), ("gpt_oss", torch.float64)],
)
def test_warm_up_equals_plain_training_of_the_scored_weights(family: str, dtype: torch.dtype) -> None:
    model = model_of(family, seed=1, dtype=dtype)
    twin = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scored, some, steps = scored_layers(model, LAYERS), batches(), []
    flags = state(model)
    masters = warm_up(scored, some, 5e-3, "sdpa", steps.append)
    assert steps == [1] * len(some)
    assert state(model) == flags
    losses = plain_training(twin, set(masters), some, 5e-3)
    assert losses[-1] < 0.9 * losses[0]
    close = 1e-5 if dtype == torch.float64 else 1e-4  # Adam's quotient of two tiny numbers magnifies float32 rounding
    assert masters.keys() == scored.weights().keys()
    for name, parameter in model.named_parameters():
        if name not in masters:
            assert torch.equal(parameter, before[name])
            continue
        assert masters[name].dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(parameter, masters[name].to(dtype))
        assert float((parameter.detach() - before[name]).abs().max()) > 1e-3
        assert float((parameter - twin.get_parameter(name)).detach().abs().max()) < close, name


def test_warm_up_reduces_the_loss() -> None:
    model = model_of("llama", seed=1, dtype=torch.float32)
    scored, some = scored_layers(model, LAYERS), batches()

    def loss() -> float:
        return float(ghost_pass(scored, some[0], lambda captured: None).mean())

    before = loss()
    warm_up(scored, some, 5e-3, "sdpa", lambda steps: None)
    assert loss() < 0.9 * before


def test_warm_up_keeps_float32_masters_of_a_bfloat16_model() -> None:
    model = model_of("llama", seed=1, dtype=torch.bfloat16)
    scored = scored_layers(model, LAYERS)
    masters = warm_up(scored, batches(), 1e-5, "sdpa", lambda steps: None)
    for name, weight in scored.weights().items():
        assert masters[name].dtype == torch.float32
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, masters[name].bfloat16())
    assert any(not torch.equal(weight.float(), masters[name]) for name, weight in scored.weights().items())


def test_warm_up_names_a_loss_that_is_nan() -> None:
    model = model_of("llama", seed=1, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = math.nan
    batch = collate([[3, 4, 5], [3, 60, 5]], [[IGNORED, 4, 5], [IGNORED, 60, 5]])
    with pytest.raises(NonFinite, match="example 1"):
        warm_up(scored_layers(model, LAYERS), [batch], 1e-3, "sdpa", lambda steps: None)


def test_the_schedule_rises_and_falls() -> None:
    factors = [schedule(step, 40) for step in range(40)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a >= b >= 0 for a, b in zip(factors[4:], factors[5:], strict=False))
    assert factors[-1] < 0.01
    assert [schedule(0, 1), schedule(0, 3)] == [1.0, 1.0]


# --- sampling ------------------------------------------------------------------------------------------------------


def counting(vocabulary: int = 20) -> Any:
    """A model that all but surely continues t with t + 1, up to the vocabulary's end."""
    config = LlamaConfig(**{**COMMON, "vocab_size": vocabulary, "eos_token_id": 12})
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary, 24))
        model.lm_head.weight.copy_(40 * torch.eye(vocabulary, 24).roll(1, dims=0))
    return model


def test_completions_end_with_their_end_of_sequence_token() -> None:
    model = counting().train()
    before = state(model)
    prompts = [[3, 5, 7], [4], [1, 2, 3, 8]]
    found = sample_completions(model, prompts, 3, 1.0, [9, 11])
    assert found.lengths.tolist() == [5, 4, 5]
    assert found.input_ids.tolist() == [[3, 5, 7, 8, 9], [4, 5, 6, 7, 0], [1, 2, 3, 8, 9]]
    n = IGNORED
    assert found.labels.tolist() == [[n, n, n, 8, 9], [n, 5, 6, 7, n], [n, n, n, n, 9]]
    assert state(model) == before


def test_without_an_end_completions_have_full_length() -> None:
    model = counting()
    model.generation_config = GenerationConfig(eos_token_id=12)
    found = sample_completions(model, [[9], [3, 4]], 6, 1.0, [])
    assert found.input_ids.tolist() == [[9, 10, 11, 12, 13, 14, 15, 0], [3, 4, 5, 6, 7, 8, 9, 10]]
    assert (found.labels != IGNORED).sum(1).tolist() == [6, 6]


def test_sampling_ignores_the_penalties_of_the_models_own_generation_config() -> None:
    """Qwen2 ships a repetition penalty; the Fisher wants the model's own distribution."""
    model = counting()
    own = GenerationConfig(
        eos_token_id=12, repetition_penalty=100.0, suppress_tokens=[6], temperature=5.0, top_k=2, no_repeat_ngram_size=2
    )
    model.generation_config = own
    found = sample_completions(model, [[5, 6, 7, 4]], 4, 1.0, [9])
    assert found.input_ids.tolist() == [[5, 6, 7, 4, 5, 6, 7, 8]]
    assert model.generation_config is own


def test_samples_follow_the_models_distribution_at_the_temperature() -> None:
    model = randomised(LlamaForCausalLM(LlamaConfig(**{**COMMON, "vocab_size": 20})), 1)
    prompts = [[3, 4, 5]] * 1000 + [[7, 8]] * 1000  # the shorter ones are padded on the left
    for temperature in (1.0, 2.0):
        torch.manual_seed(0)
        found = sample_completions(model, prompts, 1, temperature, [2])
        for prompt, rows in (([3, 4, 5], slice(0, 1000)), ([7, 8], slice(1000, 2000))):
            wanted = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
            counts = torch.bincount(found.input_ids[rows, len(prompt)], minlength=20) / 1000
            assert float((counts - wanted).abs().sum()) < 0.15


# --- batches -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_groups_hold_every_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = by_token_budget(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        longest = max(lengths[i] for i in group)
        assert longest * len(group) <= budget or len(group) == 1
        assert lengths[group[0]] == longest
    order = [(-lengths[i], i) for group in groups for i in group]
    assert order == sorted(order)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_a_group_is_closed_only_when_it_is_full(lengths: list[int], budget: int) -> None:
    groups = by_token_budget(lengths, budget)
    for group in groups[:-1]:
        assert lengths[group[0]] * (len(group) + 1) > budget


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=6))
def test_a_batch_holds_its_sequences_and_knows_its_positions(ids: list[list[int]]) -> None:
    labels = [[t if t % 2 else IGNORED for t in one] for one in ids]
    batch = collate(ids, labels)
    length = max(map(len, ids))
    assert batch.shape == (len(ids), length)
    real = [r * length + i for r, one in enumerate(ids) for i in range(len(one))]
    assert batch.real().tolist() == real
    predicting = [r * length + i - 1 for r, one in enumerate(labels) for i in range(1, len(one)) if one[i] != IGNORED]
    assert batch.predicting().tolist() == predicting
    for row, one in enumerate(ids):
        alone = batch.rows(slice(row, row + 1))
        assert alone.input_ids.tolist() == [one]
        assert alone.labels.tolist() == [labels[row]]


# --- the visitor ---------------------------------------------------------------------------------------------------


def test_a_visitor_sees_every_map_once_from_the_last_to_the_first(policy: nn.Module) -> None:
    scored, seen = scored_layers(policy, LAYERS), []

    def look(captured: Captured) -> None:
        seen.append(captured.map.name)
        assert captured.entering.shape[0] == captured.error.shape[0] == 4 * 15
        assert captured.shape == (4, 15)
        assert not captured.entering.requires_grad
        assert len(captured.bands) == (LAYERS if WINDOW else 0)

    losses = ghost_pass(scored, TRAIN.batch(), look, "sdpa", WINDOW)
    assert sorted(seen) == sorted(scored.weights())
    assert [name for name in seen if "layers.1" in name] == seen[7:]
    assert losses.shape == TRAIN.batch().predicting().shape


def test_outer_sums_of_a_bfloat16_model_are_float32() -> None:
    scored = scored_layers(model_of("llama", dtype=torch.bfloat16), 1)
    assert {t.dtype for t in OuterSum(scored).total.values()} == {torch.float32}

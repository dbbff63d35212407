"""Every architecture against the pairwise definition; what is scored, what is left out, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from alphatoken.pipeline.maths.decoder import UnsupportedModel, scored_layers
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.valuer import TokenValuer
from benchmarks.models.small import build, model_types
from benchmarks.models.weights import randomised
from tests.maths import pairwise
from tests.maths.comparison import (
    Sequences,
    assert_same,
    directions,
    expected,
    sequences,
    the_same_twice,
    validation_gradient,
)
from tests.maths.tiny_models import COMMON, FAMILIES, LLAMA, model_of, nearby

LAYERS, WINDOW = 2, 6


def compare(policy: nn.Module, layout: pairwise.Layout, attention: str = "sdpa", relative: float = 1e-9) -> None:
    """Engine and oracle on three sequences of unequal length in one padded batch."""
    reference = nearby(policy, seed=2)
    train, validation, completions = sequences([13, 6, 10], 3), [sequences([9, 7], 4)], sequences([8, 11], 5)
    made = directions(policy, reference, LAYERS, validation, completions)
    found = TokenValuer(policy, made, LAYERS, WINDOW, attention).value(train.batch())
    wanted = expected(policy, reference, layout, LAYERS, train, validation, completions, WINDOW)
    assert_same(found, [one.tokens for one in wanted], relative)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_column_equals_the_pairwise_definition(family: str) -> None:
    relative = 1e-6 if family == "deepseek_v3" else 1e-9  # its router computes in float32 whatever the model's dtype
    compare(model_of(family, seed=1), FAMILIES[family].layout, relative=relative)


@pytest.mark.parametrize("family", ["mistral", "gpt2", "gemma3", "gpt_neox"])
def test_the_blockwise_attention_gives_the_same(family: str) -> None:
    compare(model_of(family, seed=1), FAMILIES[family].layout, attention="eager")


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_models_agree_to_float32_rounding(family: str) -> None:
    compare(model_of(family, seed=1, dtype=torch.float32), FAMILIES[family].layout, relative=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_coverage_counts_every_matrix_and_names_what_is_left_out(family: str) -> None:
    model, layout = model_of(family), FAMILIES[family].layout
    coverage = scored_layers(model, LAYERS).coverage
    layers = [f"{layout.layers}.{i}" for i in (1, 2)]
    names = [f"{layer}.{linear}.weight" for layer in layers for linear in layout.linears]
    if layout.experts is not None:
        names += [f"{layer}.{layout.experts}.{m}" for layer in layers for m in ("gate_up_proj", "down_proj")]
    left_out = [f"{layer}.{router}.weight" for layer in layers for router in layout.routers]
    size = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert {m.name for m in scored_layers(model, LAYERS).maps} == set(names)
    assert coverage.left_out == tuple(left_out)
    inside, outside = sum(size[name] for name in names), sum(size[name] for name in left_out)
    assert (coverage.scored, coverage.total) == (inside, inside + outside)
    assert coverage.fraction == pytest.approx(inside / (inside + outside))
    assert (coverage.fraction < 1) == bool(layout.routers)
    assert coverage.vectors == sum(n for name, n in size.items() if name.startswith(tuple(layers))) - coverage.total


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_the_tiny_model_matters(family: str) -> None:
    """What the comparison is meant to see must change the loss: caps, windows, sinks, gains, biases, routers."""
    model, some = model_of(family, seed=1), sequences([14], 3)
    ids = torch.tensor(some.ids)
    reference = model(input_ids=ids).logits
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "router" in name or "mlp.gate.weight" in name:
            before = parameter.data
            parameter.data = before * 0.5
            assert not torch.allclose(model(input_ids=ids).logits, reference, rtol=1e-6) or ".k_proj.bias" in name, name
            parameter.data = before
    caps = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
    for key, value in {**caps, "sliding_window": 64, "query_pre_attn_scalar": 3}.items():
        if getattr(model.config, key, None) is None:
            continue
        changed = FAMILIES[family].build().config
        setattr(changed, key, value)
        twin = type(model)(changed).double()
        twin.load_state_dict(model.state_dict())
        if FAMILIES[family].layout.experts is not None:
            twin.set_experts_implementation("eager")
        twin.set_attn_implementation("eager")
        assert not torch.allclose(twin.eval()(input_ids=ids).logits, reference, rtol=1e-3), key


def test_tied_embeddings_change_nothing() -> None:
    policy = randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**{**COMMON, "tie_word_embeddings": True})), 1).double()
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.3)
    compare(policy, LLAMA)


@pytest.mark.parametrize("bias", [True, False])
def test_biases_or_none(bias: bool) -> None:
    config = hf.LlamaConfig(**COMMON, attention_bias=bias, mlp_bias=bias)
    policy = randomised(hf.LlamaForCausalLM(config), 1).double()
    assert (policy.model.layers[1].mlp.up_proj.bias is not None) == bias
    compare(policy, LLAMA)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("CohereForCausalLM", hf.CohereConfig(**COMMON, logit_scale=0.4)),
        (
            "GraniteForCausalLM",
            hf.GraniteConfig(**COMMON, logits_scaling=3.0, attention_multiplier=0.3, residual_multiplier=0.7),
        ),
    ],
)
def test_scaled_logits_and_attention_are_kept(name: str, config: hf.PretrainedConfig) -> None:
    compare(randomised(getattr(hf, name)(config), 1).double(), LLAMA)


def test_a_head_that_skips_the_base_model_is_short_circuited() -> None:
    """OPTForCausalLM calls `model.decoder` and not its base model."""
    config = hf.OPTConfig(**COMMON, ffn_dim=36, word_embed_proj_dim=24)
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
    compare(
        randomised(hf.OPTForCausalLM(config), 1).double(),
        pairwise.Layout("model.decoder.layers", linears, "self_attn.v_proj"),
    )


# --- experts ---------------------------------------------------------------------------------------------------------


def plain_gradient(model: nn.Module, some: Sequences) -> dict[str, torch.Tensor]:
    """Plain autograd's gradient of the summed loss, sequence by sequence."""
    model.requires_grad_(True)
    for ids, labels in zip(some.ids, some.labels, strict=True):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum", ignore_index=-100).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


class _Norm(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 0.1)


@pytest.mark.parametrize("variant", ["post norm", "no gate"])
def test_variants_of_the_experts_interface(variant: str) -> None:
    """A norm after each expert (Muse Spark) and experts without a gate (Nemotron-H)."""
    model = model_of("mixtral", seed=1)
    model.set_experts_implementation("batched_mm")
    for layer in model.model.layers:
        experts = layer.mlp.experts
        if variant == "post norm":
            experts.has_post_expert_norm, experts.post_expert_norm = True, _Norm()
        else:
            experts.has_gate = False
            experts.up_proj = nn.Parameter(experts.gate_up_proj.detach()[:, ::2].contiguous())
            del experts.gate_up_proj
    some = sequences([12, 7], 3)
    scored = scored_layers(model, LAYERS)
    gradient = OuterSum(scored)
    ghost_pass(scored, some.batch(), gradient)
    wanted = plain_gradient(model, some)
    assert any("experts" in name for name in gradient.total)
    for name, total in gradient.total.items():
        assert torch.allclose(total, wanted[name], rtol=1e-7, atol=1e-7 * float(wanted[name].abs().max())), name


class _ListedExperts(nn.Module):
    """A mixture whose experts are modules, each applied to the tokens that chose it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(size, size, dtype=torch.float64) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        output = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows = ((flat[:, 0] > 0) == bool(index)).nonzero().squeeze(1)
            output = output.index_add(0, rows, expert(flat[rows]))
        return output.view_as(hidden)


def the_rest_is_right(model: nn.Module, layers: int = LAYERS) -> None:
    """Summed over all positions, `adaptation_direct` is the inner product with plain autograd's gradient."""
    some = sequences([12, 7], 3)
    gradient = validation_gradient(model, layers, [some.batch()])
    values = TokenValuer(model, the_same_twice(gradient), layers, WINDOW).value(some.batch(), some.batch().real())
    model.requires_grad_(True)
    for row in range(2):
        model.zero_grad()
        logits = model(input_ids=torch.tensor([some.ids[row]])).logits[0, :-1]
        F.cross_entropy(logits, torch.tensor(some.labels[row][1:]), reduction="sum", ignore_index=-100).backward()
        wanted = sum((model.get_parameter(n).grad * g).sum() for n, g in gradient.items())
        assert float(values["adaptation_direct"][row].sum()) == pytest.approx(float(wanted), rel=1e-6)


def test_experts_outside_the_interface_are_left_out_and_counted() -> None:
    """What such an expert leaves out of the sums is said; what the other maps add up to stays right."""
    model = model_of("llama", seed=1)
    model.model.layers[2].mlp = _ListedExperts(24)
    names = tuple(f"model.layers.2.mlp.experts.{i}.{part}" for i in (0, 1) for part in ("weight",))
    coverage = scored_layers(model, LAYERS).coverage
    assert coverage.left_out == names
    assert coverage.total - coverage.scored == 2 * 24 * 24
    the_rest_is_right(model)


class _PastItsModule(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size, dtype=torch.float64)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.inner.weight)


def test_a_weight_that_is_applied_past_its_module_is_left_out_and_counted() -> None:
    model = model_of("llama", seed=1)
    model.model.layers[2].mlp = _PastItsModule(24)
    assert scored_layers(model, LAYERS).coverage.left_out == ("model.layers.2.mlp.inner.weight",)
    the_rest_is_right(model)


class _AddsInPlace(nn.Module):
    """Writes to what its linear map returned, as Falcon's layers do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size, dtype=torch.float64)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = self.inner(hidden)
        found += hidden
        return found


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_a_block_that_several_layers_share_is_left_out_and_what_is_scored_has_its_whole_gradient(layers: int) -> None:
    model = build(
        next(kind for kind in model_types() if kind.name == "zamba")
    )  # layers 1 and 3 have one attention block
    scored, batch = scored_layers(model, layers), sequences([9, 12], 3, vocabulary=30).batch()
    assert len({id(linear.parameter) for linear in scored.maps}) == len(scored.maps) > 0
    assert any("shared" in name for name in scored.coverage.left_out) and scored.coverage.fraction < 1
    gradient = OuterSum(scored)
    ghost_pass(scored, batch, gradient)
    parameters = [linear.parameter.requires_grad_() for linear in scored.maps]
    logits = model(batch.input_ids).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum").backward()
    for linear, parameter in zip(scored.maps, parameters, strict=True):
        torch.testing.assert_close(gradient.total[linear.name], parameter.grad, rtol=1e-6, atol=1e-9)


def test_a_layer_may_write_to_what_a_map_returned() -> None:
    model = model_of("llama", seed=1)
    model.model.layers[2].mlp = _AddsInPlace(24)
    assert scored_layers(model, LAYERS).coverage.fraction == 1.0
    the_rest_is_right(model)


class _OverwritesItsInput(_AddsInPlace):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        entering = hidden.clone()
        found = self.inner(entering)
        entering.mul_(2)
        return found + entering


def test_a_layer_that_overwrites_what_entered_a_map_is_refused() -> None:
    model = model_of("llama", seed=1)
    model.model.layers[2].mlp = _OverwritesItsInput(24)
    with pytest.raises(UnsupportedModel, match=r"what enters model.layers.2.mlp.inner.weight is overwritten"):
        validation_gradient(model, LAYERS, [sequences([9], 1).batch()])


# --- quantised and foreign linear maps -----------------------------------------------------------------------------


class _Int8Linear(nn.Linear):
    """Stores rounded weights; as a parameter (bitsandbytes) or as a buffer (GPTQ and others)."""

    def __init__(self, source: nn.Linear, buffer: bool, dtype: torch.dtype) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        scale = source.weight.detach().abs().max() / 100
        if dtype.is_floating_point:
            codes = (source.weight.detach() / scale).to(dtype)
        else:
            codes = (source.weight.detach() / scale).round().to(dtype)
        del self.weight
        self.register_buffer("scale", scale)
        if buffer:
            self.register_buffer("codes", codes)
            self.weight = None
        else:
            self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        codes = self.codes if self.weight is None else self.weight
        return hidden @ (codes.to(hidden.dtype) * self.scale).T


@pytest.mark.parametrize(("buffer", "dtype"), [(False, torch.int8), (True, torch.int8), (False, torch.float8_e4m3fn)])
def test_a_quantised_map_in_a_scored_layer_is_left_out_and_counted(buffer: bool, dtype: torch.dtype) -> None:
    policy = model_of("llama", seed=1)
    mlp = policy.model.layers[1].mlp
    mlp.up_proj = _Int8Linear(mlp.up_proj, buffer, dtype)
    coverage = scored_layers(policy, LAYERS).coverage
    name = f"model.layers.1.mlp.up_proj.{'codes' if buffer else 'weight'}"
    assert coverage.left_out == (name,)
    assert coverage.total - coverage.scored == 24 * 36
    some = sequences([12, 7], 3)
    gradient = validation_gradient(policy, LAYERS, [some.batch()])
    values = TokenValuer(policy, the_same_twice(gradient), LAYERS, WINDOW).value(some.batch(), some.batch().real())
    for module in policy.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, _Int8Linear):
            module.weight.requires_grad_(True)
    for row in range(2):
        logits = policy(input_ids=torch.tensor([some.ids[row]])).logits[0, :-1]
        policy.zero_grad()
        F.cross_entropy(logits, torch.tensor(some.labels[row][1:]), reduction="sum", ignore_index=-100).backward()
        wanted = sum((policy.get_parameter(n).grad * g).sum() for n, g in gradient.items())
        assert float(values["adaptation_direct"][row].sum()) == pytest.approx(float(wanted), rel=1e-6)


def test_no_causal_path_leads_through_a_quantised_value_projection() -> None:
    policy = model_of("llama", seed=1)
    attention = policy.model.layers[2].self_attn
    attention.v_proj = _Int8Linear(attention.v_proj, False, torch.int8)
    gradient = validation_gradient(policy, LAYERS, [sequences([9], 1).batch()])
    valuer = TokenValuer(policy, the_same_twice(gradient), LAYERS, WINDOW)
    assert valuer.causal_layers == 1
    assert valuer.value(sequences([9], 1).batch())["adaptation_causal"].any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_lower_layer_is_fine(dtype: torch.dtype) -> None:
    policy = model_of("llama", seed=1)
    for part in (policy.model.layers[0].mlp, policy.model.layers[0].self_attn):
        for name, module in list(part.named_children()):
            if isinstance(module, nn.Linear):
                setattr(part, name, _Int8Linear(module, False, dtype))
    assert scored_layers(policy, LAYERS).coverage.fraction == 1.0
    some = sequences([12, 7], 3)
    gradient = validation_gradient(policy, LAYERS, [some.batch()])
    values = TokenValuer(policy, the_same_twice(gradient), LAYERS, WINDOW).value(some.batch(), some.batch().real())
    logits = policy(input_ids=torch.tensor([some.ids[0]])).logits[0, :-1]
    F.cross_entropy(logits, torch.tensor(some.labels[0][1:]), reduction="sum", ignore_index=-100).backward()
    wanted = sum((policy.get_parameter(n).grad * g).sum() for n, g in gradient.items())
    assert float(values["adaptation_direct"][0].sum()) == pytest.approx(float(wanted), rel=1e-6)


def test_a_model_quantised_throughout_is_refused() -> None:
    policy = model_of("llama")
    for part in [p for layer in policy.model.layers for p in (layer.mlp, layer.self_attn)]:
        for name, module in list(part.named_children()):
            if isinstance(module, nn.Linear):
                setattr(part, name, _Int8Linear(module, False, torch.int8))
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM: none of the 14 matrices.*unquantised"):
        scored_layers(policy, LAYERS)


class _Router(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(hidden).topk(1)


def test_a_linear_subclass_with_a_forward_of_its_own_is_left_out() -> None:
    policy = model_of("llama")
    policy.model.layers[2].mlp.router = _Router(24, 4)
    assert scored_layers(policy, LAYERS).coverage.left_out == ("model.layers.2.mlp.router.weight",)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_refused() -> None:
    config = hf.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is an encoder-decoder"):
        scored_layers(hf.T5ForConditionalGeneration(config), 1)


def _state_space() -> nn.Module:
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2))


def test_state_space_layers_are_valued_without_a_causal_path() -> None:
    model, some = randomised(_state_space(), 1).double(), sequences([12, 7], 3)
    some_directions = the_same_twice(validation_gradient(model, 1, [some.batch()]))
    valuer = TokenValuer(model, some_directions, 1, WINDOW)
    assert valuer.causal_layers == 0
    assert not valuer.value(some.batch())["adaptation_causal"].any()
    the_rest_is_right(model, 1)


def test_a_peft_wrapper_is_refused_with_the_remedy() -> None:
    model = model_of("llama")
    model.peft_config = {"default": SimpleNamespace()}
    with pytest.raises(UnsupportedModel, match=r"PEFT.*merge_and_unload"):
        scored_layers(model, 1)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="LlamaModel has no decoder below.*causal LM"):
        scored_layers(model_of("llama").model, 1)


def test_something_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Linear is not a transformers model"):
        scored_layers(nn.Linear(2, 2), 1)


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="valuation.layers=4, but LlamaForCausalLM has 3"):
        scored_layers(model_of("llama"), 4)

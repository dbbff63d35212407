"""Models whose lower layers are spread, offloaded or narrower: the same numbers, and what cannot be is refused."""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alphatoken import Directions, TokenValuer
from alphatoken.pipeline.maths.decoder import UnsupportedModel, scored_layers
from alphatoken.pipeline.maths.guard import Guard
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.placement import Placement, offloaded_layers, sizes_of
from alphatoken.pipeline.maths.sampling import sample_completions
from benchmarks.models.weights import randomised
from tests.maths.comparison import sequences
from tests.maths.tiny_models import COMMON, model_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
BATCH = sequences((9, 17, 13), seed=3).batch()
FAMILIES = ("llama", "gpt2", "gemma2", "gemma3", "mixtral", "gpt_oss")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> a checkpoint of a tiny model on disk."""

    def save(family: str) -> ModelSource:
        place = tmp_path_factory.getbasetemp() / f"spread-{family}"
        if not place.exists():
            model = model_of(family, dtype=torch.float32) if family != "deep" else deep()
            model.save_pretrained(place)
        return ModelSource(str(place))

    return save


def deep():
    """A Llama of five layers, so that some of the lower ones may be offloaded and others not."""
    torch.manual_seed(0)
    return randomised(LlamaForCausalLM(LlamaConfig(**(COMMON | {"num_hidden_layers": 5}))), 0)


def whole(source: ModelSource):
    return load_model(source, CPU)


def room_for(model, layers: int, lower_dtype: str = "auto") -> int:
    """Bytes that leave room for all but the lower layers, and for ``layers`` of these beside the one that is brought."""
    stack = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    sizes, rest = sizes_of(list(stack[:-1]), model, lower_dtype, torch.float32)
    return rest + (1 + layers) * max(sizes)


def directions_of(model, seed: int, own: bool = False) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    weights = scored_layers(model, 1).weights()
    named = {
        name: {key: torch.randn(w.shape, generator=generator) for key, w in weights.items()}
        for name in ("adaptation", "stability")
    }
    moved = {key: w + 0.01 * torch.randn(w.shape, generator=generator) for key, w in weights.items()}
    return Directions(named, moved if own else None)


def values_of(model, directions: Directions) -> dict[str, torch.Tensor]:
    return TokenValuer(model, directions, 1, 4, exact=True).value(BATCH)


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_lower_layers_give_the_values_of_the_whole_model_to_the_bit(saved, family):
    source = saved(family)
    plain = whole(source)
    model = load_model(source, Placement((CPU,), 1, offload="disk", device_bytes=room_for(plain, 0)))
    scored = scored_layers(model, 1)
    assert offloaded_layers(scored.lower) == 2 and scored.coverage.fraction > 0.5
    for own in (False, True):
        expected, found = (values_of(one, directions_of(plain, 5, own)) for one in (plain, model))
        assert set(found) == set(expected) and float(expected["adaptation_causal"].abs().sum()) > 0
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(DoesNotRun):
        next(iter(scored.lower[0].parameters())).sum().item()  # between passes there are no weights
    assert Guard(scored, "sdpa", 4)(BATCH.input_ids.tolist()).hidden < 1e-4


DoesNotRun = (RuntimeError, NotImplementedError)


def test_one_layer_of_several_may_be_offloaded_and_layers_may_cross_devices_of_one_kind(saved):
    source = saved("deep")
    plain = whole(source)
    expected = values_of(plain, directions_of(plain, 5))
    for placement, away in (
        (Placement((CPU,), 1, offload="disk", device_bytes=room_for(plain, 1)), 3),
        (Placement((CPU, CPU), 1), 0),
        (Placement((CPU, CPU), 1, "float32"), 0),
        (Placement((CPU, CPU), 1, offload="disk", device_bytes=room_for(plain, 0)), 2),
        (Placement((CPU,), None, offload="disk"), 0),
    ):
        model = load_model(source, placement)
        scored = scored_layers(model, 1)
        assert offloaded_layers(scored.lower) == away
        found = values_of(model, directions_of(plain, 5))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_passes_of_several_checkpoints_share_offloaded_lower_layers(saved):
    source = saved("llama")
    plain = whole(source)
    model = load_model(source, Placement((CPU,), 1, offload="disk", device_bytes=room_for(plain, 0)))
    several = [directions_of(plain, seed, own=True) for seed in (1, 2)]
    expected = [values_of(plain, one) for one in several]
    valuers = [TokenValuer(model, one, 1, 4, exact=True) for one in several]
    brought = []
    inner = model.model.layers[0].mlp
    hook = inner.register_forward_pre_hook(lambda module, args: brought.append(1))
    with lower_layers_once(valuers[0].scored):
        found = [valuer.value(BATCH) for valuer in valuers]
    hook.remove()
    assert len(brought) == 1  # for two checkpoints, with two directions each
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_completions_are_those_of_the_whole_model(saved):
    source = saved("deep")
    plain = whole(source)
    model = load_model(source, Placement((CPU, CPU), 1, offload="disk", device_bytes=room_for(plain, 0)))
    drawn = []
    for one in (plain, model):
        torch.manual_seed(0)
        drawn.append(sample_completions(one, [[5, 6, 7], [8, 9]], 6, 1.0, [2]).input_ids)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_narrower_lower_layers_leave_all_else_as_the_checkpoint_has_it(saved, family, offload):
    source = saved(family)
    plain = whole(source)
    own = dict(plain.named_parameters())
    placement = Placement((CPU,), 1, "bfloat16", offload, room_for(plain, 0, "bfloat16") if offload == "disk" else None)
    model = load_model(source, placement)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # grouped_mm, the default, knows no tiny bfloat16
    scored = scored_layers(model, 1)
    lower = {name for layer in scored.lower for name, p in model.named_parameters() if p in set(layer.parameters())}
    assert lower and offloaded_layers(scored.lower) == (2 if offload == "disk" else 0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name in lower else torch.float32)
        if not parameter.is_meta:
            assert torch.equal(parameter, own[name].to(parameter.dtype))  # not rounded on the way
    head = model.get_output_embeddings().weight
    assert torch.equal(head, plain.get_output_embeddings().weight)
    entering, theirs = _entering(model), _entering(plain)
    assert entering.dtype == torch.float32 and 0 < (entering - theirs).norm() < 0.05 * theirs.norm()
    expected, found = (values_of(one, directions_of(plain, 5)) for one in (plain, model))
    assert (found["loss"] - expected["loss"]).norm() < 0.1 * expected["loss"].norm()
    Guard(scored, "sdpa", 4)(BATCH.input_ids.tolist())


def _entering(model) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    scored = scored_layers(model, 1)
    with torch.no_grad(), lower_layers_once(scored, kept):
        scored.decoder(input_ids=BATCH.input_ids, use_cache=False)
    return kept[0]


@torch.no_grad()
def test_narrower_lower_layers_are_those_of_a_model_that_is_so_throughout(saved):
    source = saved("llama")
    plain, narrow = whole(source), whole(source).to(torch.bfloat16)
    model = load_model(source, Placement((CPU,), 1, "bfloat16"))
    ids = BATCH.input_ids[1:2]  # a row without padding
    positions = torch.arange(ids.shape[1])[None]
    hidden = plain.model.embed_tokens(ids)
    turned = tuple(one.to(torch.bfloat16) for one in plain.model.rotary_emb(hidden, positions))
    hidden = hidden.to(torch.bfloat16)
    for layer in narrow.model.layers[:2]:
        hidden = layer(hidden, position_embeddings=turned, attention_mask=None, position_ids=positions)
    kept: list[torch.Tensor] = []
    with lower_layers_once(scored_layers(model, 1), kept):
        model.model(input_ids=ids, use_cache=False)
    assert torch.equal(kept[0], hidden.float())


def test_an_adapter_is_merged_before_its_model_is_laid_out(saved, tmp_path):
    source = saved("llama")
    base = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = ModelSource(str(tmp_path / "adapter"))
    plain = whole(adapter)
    model = load_model(adapter, Placement((CPU,), 1, offload="disk", device_bytes=room_for(plain, 0)))
    expected, found = (values_of(one, directions_of(plain, 5)) for one in (plain, model))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(expected["loss"], values_of(whole(source), directions_of(plain, 5))["loss"])
    with pytest.raises(UnreadableModel, match="PEFT adapter|bitsandbytes"):
        load_model(adapter, Placement((CPU,), 1, "int8"))


def test_weights_that_are_written_anew_to_be_offloaded_go_with_the_model(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for family, files in (("llama", False), ("mixtral", True)):  # stacked experts are stored one by one
        source = saved(family)
        room = room_for(whole(source), 0)
        model = load_model(source, Placement((CPU,), 1, offload="disk", device_bytes=room))
        assert any(Path(tmp_path).rglob("*.safetensors")) == files
        del model
        gc.collect()
        assert not list(Path(tmp_path).iterdir())


def test_a_map_of_ones_own_has_to_hold_what_is_scored_on_its_last_device(saved):
    source = saved("llama")
    plain = whole(source)
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    layers = [f"model.layers.{index}" for index in range(3)]
    good = rest | dict(zip(layers, ("disk", "cpu", "cpu"), strict=True))
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, device_map=good)
    expected, found = (values_of(one, directions_of(plain, 5)) for one in (plain, model))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    for bad in (rest | dict(zip(layers, ("cpu", "cpu", "disk"), strict=True)),):
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, device_map=bad)
        with pytest.raises(
            UnsupportedModel, match=r"the last 1 layers and the head lie on cpu, meta \(meta: offloaded\)"
        ):
            scored_layers(model, 1)


def test_what_cannot_be_laid_out_is_refused_by_name(saved):
    source = saved("llama")
    with pytest.raises(UnreadableModel, match=r"model\.offload=cpu: .* set model\.offload=disk"):
        load_model(source, Placement((CPU,), 1, offload="cpu"))


def test_hidden_states_cross_between_two_devices_and_nothing_else_does():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.maths.cross_devices"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    top, lower = "pretended", "cpu"
    for first, second in (done.stdout.splitlines()[:2], done.stdout.splitlines()[2:]):
        where = f"{{('{top}', '{top}', torch.float32)}}"
        assert first == f"auto {lower} {lower} {lower} {top} {where}"  # as many as there is room for on the last one
        assert second == f"bfloat16 {lower} {lower} {lower} {lower} {where}"
        top, lower = lower, top

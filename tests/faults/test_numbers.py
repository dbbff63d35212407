"""NaN, infinity and overflow are named where they arise; a warm-up that was interrupted gives the same numbers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alphatoken import Directions, TokenValuer
from alphatoken.pipeline.anchor import saving
from alphatoken.pipeline.anchor.tensors import counts_of, read_tensors, write_tensors
from alphatoken.pipeline.anchor.worker import WARMUP_STATE, AnchorTask, AnchorWorker, Sequences
from alphatoken.pipeline.maths.batch import collate
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.warmup import warm_up
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import AnchorSettings, Settings, ValuationSettings


def tiny(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


BATCH = collate([[5, 6, 7, 8, 9], [1, 2, 3]], [[-100, -100, 7, 8, 9], [-100, 2, 3]])


def value(model: LlamaForCausalLM, scale: float = 1.0) -> dict[str, torch.Tensor]:
    weights = scored_layers(model, 2).weights()
    named = {
        name: {k: torch.full_like(w.float(), scale) for k, w in weights.items()} for name in ("adaptation", "stability")
    }
    mask = (torch.arange(BATCH.shape[1]) < BATCH.lengths[:, None]).long()
    return TokenValuer(model, Directions(named), layers=2, window=2)(BATCH.input_ids, mask, BATCH.labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_without_overflow_is_fine(dtype):
    assert all(bool(torch.isfinite(v).all()) for v in value(tiny(dtype)).values())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 3e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)])
def test_overflow_of_an_activation_is_named_by_example_and_module(dtype, size):
    model = tiny(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(size)
        model.model.layers[1].mlp.up_proj.weight.fill_(1.0)
        model.model.layers[1].mlp.gate_proj.weight.fill_(1.0)
    with pytest.raises(NonFinite, match=r"layers\.1\.mlp\.down_proj of example \d"):
        value(model)


def test_a_nan_weight_is_named(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[1, 1] = float("nan")
    with pytest.raises(NonFinite, match=r"layers\.2\.self_attn\.v_proj"):
        value(model)


def test_overflow_of_the_products_with_the_directions_is_named():
    with pytest.raises(NonFinite, match="the products with the directions"):
        value(tiny(), scale=3e38)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_tensor_with_nan_or_infinity_is_written(tmp_path, bad):
    storage = Storage(str(tmp_path))
    with pytest.raises(RunFailed, match=r"NaN or infinity in layer\.w while making anchors/x"):
        write_tensors(storage, "anchors/x", {"layer.w": torch.tensor([1.0, bad])}, {})
    with pytest.raises(RunFailed, match="infinity"):  # a value that no float32 holds
        write_tensors(storage, "anchors/x", {"layer.w": torch.tensor([1e300], dtype=torch.float64)}, {})
    assert not storage.exists("anchors/x")


def test_a_warm_up_goes_on_to_the_same_bits_from_every_step():
    batches = [collate([[1 + i, 2, 3, 4], [5, 6 + i, 7]], [[-100, 2, 3, 4], [-100, 6 + i, 7]]) for i in range(5)]
    states: dict[int, dict[str, torch.Tensor]] = {}

    def save(steps: int, state: dict[str, torch.Tensor]) -> None:
        states[steps] = {name: tensor.clone() for name, tensor in state.items()}

    whole = warm_up(scored_layers(tiny(), 2), batches, 1e-2, "sdpa", lambda n: None, save=save)
    for steps in range(1, 6):
        advanced: list[int] = []
        model = tiny()
        again = warm_up(scored_layers(model, 2), batches, 1e-2, "sdpa", advanced.append, start=(steps, states[steps]))
        assert sum(advanced) == 5
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        assert all(torch.equal(whole[name], dict(model.named_parameters())[name]) for name in whole)


def test_a_worker_goes_on_from_the_last_saved_step_and_leaves_its_model_as_it_was(tmp_path, policy, monkeypatch):
    settings = Settings(anchor=AnchorSettings(snapshots=2), valuation=ValuationSettings(layers=2))
    sequences = Sequences(["a", "b"], [[4, 5, 6, 7], [8, 9, 10]], [[-100, 5, 6, 7], [-100, 9, 10]])

    def worker(place: str) -> tuple[Storage, AnchorWorker]:
        storage = Storage(str(tmp_path / place))
        return storage, AnchorWorker(storage, ModelSource(str(policy)), settings, [2])

    def task(fingerprint: str = "f") -> AnchorTask:
        return AnchorTask(
            "warmup", "anchors/snapshot-{index:02d}/policy.safetensors", sequences, 0, fingerprint=fingerprint
        )

    def stop_at(step: int):
        counted = []

        def advance(units: int) -> None:
            counted.append(units)
            if len(counted) == step:
                raise MemoryError("as if the worker had died")

        return advance

    calm, own = worker("calm")
    own(task(), lambda n: None)
    storage, interrupted = worker("interrupted")
    before = {name: w.clone() for name, w in interrupted.scored.weights().items()}
    monkeypatch.setattr(saving.time, "monotonic", lambda: 0.0)  # every step may be saved
    with pytest.raises(MemoryError):
        interrupted(task(), stop_at(3))
    assert counts_of(storage, WARMUP_STATE, "f") == {"steps": 3}
    assert all(torch.equal(before[name], w) for name, w in interrupted.scored.weights().items())
    told: list[int] = []
    interrupted(task(), told.append)
    assert told[0] == 3 and sum(told) == settings.anchor.warmup.steps
    for index in range(2):
        name = f"anchors/snapshot-{index:02d}/policy.safetensors"
        assert storage.read_bytes(name) == calm.read_bytes(name)
    told.clear()
    interrupted(task("another"), told.append)  # the state of other settings is not gone on from
    assert told[0] == 1
    assert not torch.equal(read_tensors(storage, WARMUP_STATE)["exp_avg/" + next(iter(before))], torch.zeros(()))

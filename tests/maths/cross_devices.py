"""A model over two devices, of which one is pretended:  python -m tests.maths.cross_devices

torch's fake tensors have shapes, dtypes and devices, and refuse any operation between two devices. One device is the CPU, the
other a backend that is registered for this process alone. Prints a line for each layout.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alphatoken.pipeline.maths.capture import Captured, captured
from alphatoken.pipeline.maths.decoder import ScoredLayers, decoder_of, scored_layers
from alphatoken.pipeline.maths.head import head_of
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.placement import Placement, apart, device_of
from alphatoken.pipeline.maths.spread import Spread
from alphatoken.pipeline.maths.tangents import Tangents, dual_level, tangent_of
from tests.maths.tiny_models import COMMON

CONFIG = LlamaConfig(**(COMMON | {"num_hidden_layers": 6}))
TOP = 2


def move(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """As ``module.to``, which fake parameters do not take."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to(device, dtype))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)


def laid_out(devices: tuple[torch.device, ...], lower_dtype: str) -> tuple[Any, Spread]:
    """A fake model as Spread lays it out."""
    spread = Spread(
        AutoModelForCausalLM, CONFIG, torch.float32, Placement(devices, TOP, lower_dtype, device_bytes=90_000)
    )
    model = LlamaForCausalLM(CONFIG).eval()
    for name, device in spread.map.items():
        dtype = spread.lower_dtype if name in spread.lower else None
        move(model.get_submodule(name), torch.device(device), dtype)
    return spread._settled(model), spread


def scored_of(model: Any, twin: ScoredLayers) -> ScoredLayers:
    """What ``scored_layers`` said of a twin with numbers."""
    maps = tuple(replace(m, module=model.get_submodule(m.name.rpartition(".")[0])) for m in twin.maps)
    layers = model.model.layers
    return replace(
        twin, model=model, decoder=decoder_of(model), layers=tuple(layers[-TOP:]), lower=tuple(layers[:-TOP]), maps=maps
    )


def crosses(twin: ScoredLayers, devices: tuple[torch.device, ...], lower_dtype: str) -> str:
    """Run all that the engine runs; says where lower layers ran, and where and in what dtype all was that was captured."""
    model, spread = laid_out(devices, lower_dtype)
    scored, last = scored_of(model, twin), devices[-1]
    assert device_of(model) == last and apart(model, scored.layers) is None
    assert str(apart(model, model.model.layers[:])).startswith("the last 6 layers and the head lie on cpu, pretended:0")
    run: list[str] = []
    seen: list[Captured] = []
    for layer in scored.lower:
        layer.register_forward_hook(lambda module, args, output: run.append(output.device.type))
    ids = torch.zeros(2, 9, dtype=torch.int64, device=last)
    along = Tangents(scored, {m.name: torch.zeros_like(m.parameter) for m in scored.maps})
    kept: list[torch.Tensor] = []
    with lower_layers_once(scored, kept):
        for _ in range(2):
            with dual_level(), captured(scored, None, "sdpa", 0, along):
                moved = tangent_of(model.model(input_ids=ids, use_cache=False).last_hidden_state)
            assert moved is not None and moved.device == last
    assert kept[0].device == last and kept[0].dtype == torch.float32
    assert run[:4] == [spread.placement.devices[place].type for place in spread.places], run
    with captured(scored, seen.append, "sdpa", 4):
        outputs = model.model(input_ids=ids, use_cache=False)
        hidden = outputs.last_hidden_state.flatten(0, 1)[:5]
        with head_of(scored, outputs) as head:
            assert head(hidden).device == last
        hidden.backward(torch.ones_like(hidden))
    assert len(seen) == len(scored.maps) == 14
    where = {(one.entering.device.type, one.error.device.type, one.error.dtype) for one in seen}
    for layer in model.model.layers:
        layer._forward_pre_hooks.clear()
    try:
        model.model(input_ids=ids, use_cache=False)
    except RuntimeError:  # two devices meet
        return f"{' '.join(run[:4])} {where}"
    raise AssertionError("without the crossings no two devices met")


def main() -> None:
    """Both orders of two devices, in one dtype and in two."""
    twin = scored_layers(LlamaForCausalLM(CONFIG), TOP)
    _setup_privateuseone_for_python_backend("pretended")
    cpu, other = torch.device("cpu"), torch.device("pretended", 0)
    for devices in ((cpu, other), (other, cpu)):
        for lower_dtype in ("auto", "bfloat16"):
            with FakeTensorMode():
                print(lower_dtype, crosses(twin, devices, lower_dtype))


if __name__ == "__main__":
    main()

"""Where layers go: in balance, within what devices hold, what is scored on the last; refusals name bytes and remedies."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from alphatoken.pipeline.maths.placement import (
    OFFLOADED,
    DoesNotFit,
    Placement,
    device_map,
    device_of,
    sizes_of,
    split,
)
from tests.maths.tiny_models import COMMON, model_of

FREE = float("inf")


def test_layers_are_spread_in_order_and_in_balance():
    assert split([10] * 8, 0, [FREE, FREE]) == [0] * 4 + [1] * 4
    assert split([10] * 8, 40, [FREE, FREE]) == [0] * 6 + [1] * 2  # 60 and 40 + 20
    assert split([10] * 4, 1000, [FREE] * 3) == [0, 0, 1, 1]  # the last one has enough to hold
    assert split([10] * 6, 0, [20.0, 40.0]) == [0, 0, 1, 1, 1, 1]  # by what each has room for
    assert split([], 5, [FREE, FREE]) == [] and split([1, 2], 5, [FREE]) == [0, 0]


def test_what_does_not_fit_is_offloaded_from_the_bottom_with_room_for_one_layer_at_a_time():
    assert split([10] * 6, 10, [40.0], offload=True) == [OFFLOADED] * 4 + [0] * 2  # 10 + 2 * 10 + 10 for the others
    assert split([10] * 6, 10, [70.0], offload=True) == [0] * 6
    assert split([10] * 6, 10, [30.0, 30.0], offload=True) == [OFFLOADED] * 2 + [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("lower", "rest", "rooms", "offload", "said"),
    [
        ([5 * 10**9] * 20, 10**9, [48e9, 48e9], False, "the weights take 101 GB, 1 GB of them on the last device.*others 48 GB"),
        ([10] * 2, 100, [FREE, 50.0], False, "embeddings, top layers and head take 100 bytes, and the last device takes 50 bytes"),
        ([10] * 2, 100, [105.0], True, "the largest lower layer, for which there has to be room beside them, 10 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_with_bytes_and_a_remedy(lower, rest, rooms, offload, said):
    with pytest.raises(DoesNotFit, match=f"{said}.*(gpus_per_worker|device)"):
        split(lower, rest, rooms, offload)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a machine that others use too
@given(
    st.lists(st.integers(1, 50), max_size=12), st.integers(0, 60), st.lists(st.integers(10, 120), min_size=1, max_size=4),
    st.booleans(),
)  # fmt: skip
def test_no_device_ever_holds_more_than_its_room(lower, rest, rooms, offload):
    try:
        places = split(lower, rest, [float(room) for room in rooms], offload)
    except DoesNotFit:
        if not offload:  # as much on each device as fits, in order, is not enough either
            left = [*rooms[:-1], rooms[-1] - rest]
            device = 0
            for size in lower if left[-1] >= 0 else []:
                while device < len(left) and left[device] < size:
                    device += 1
                if device == len(left):
                    break
                left[device] -= size
            else:
                assert left[-1] < 0
        return
    away = [size for size, place in zip(lower, places, strict=True) if place == OFFLOADED]
    held = [sum(s for s, p in zip(lower, places, strict=True) if p == device) for device in range(len(rooms))]
    held[-1] += rest
    held[0] += max(away, default=0)
    assert all(one <= room for one, room in zip(held, rooms, strict=True))
    assert places == sorted(places) and (offload or not away)


def test_bytes_follow_the_dtype_of_the_lower_layers():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**COMMON))
    layers = list(model.model.layers)
    matrices = sum(p.numel() for p in layers[0].parameters() if p.ndim == 2)
    vectors = sum(p.numel() for p in layers[0].parameters() if p.ndim == 1)
    for lower_dtype, each in (("auto", 4), ("float32", 4), ("bfloat16", 2)):
        sizes, rest = sizes_of(layers[:2], model, lower_dtype, torch.float32)
        assert sizes == [each * (matrices + vectors)] * 2
        assert rest == 4 * (sum(p.numel() for p in model.parameters()) - 2 * (matrices + vectors))
    assert sizes_of(layers[:1], model, "int8", torch.bfloat16)[0] == [matrices + 2 * vectors]
    assert sizes_of(layers[:1], model, "int4", torch.bfloat16)[0] == [round(0.5625 * matrices) + 2 * vectors]


def test_a_map_names_everything_once_and_what_is_not_a_lower_layer_lies_on_the_last_device():
    for family in ("llama", "gpt2", "gemma3", "mixtral"):
        model = model_of(family)
        names = [name for name, _ in model.named_parameters()]
        stack = "transformer.h" if family == "gpt2" else "model.layers"
        found = device_map(model, [f"{stack}.0", f"{stack}.1"], [0, 1], 2)
        for name in names:
            fitting = [key for key in found if name == key or name.startswith(f"{key}.")]
            assert len(fitting) == 1, (family, name, fitting)
            lower = {f"{stack}.0": 0, f"{stack}.1": 1}
            assert found[fitting[0]] == lower.get(fitting[0], 2)


def test_a_placement_of_one_device_as_it_is_is_whole():
    cpu = torch.device("cpu")
    assert Placement((cpu,), 3).whole and Placement((cpu,), 3, device_bytes=5).rooms() == [5.0]
    for other in (Placement((cpu, cpu), 3), Placement((cpu,), 3, "int8"), Placement((cpu,), 3, offload="disk")):
        assert not other.whole and not Placement((cpu,), 3, device_bytes=5).whole
        assert all(0 < room < FREE for room in other.rooms())
    assert device_of(model_of("gpt2")) == cpu

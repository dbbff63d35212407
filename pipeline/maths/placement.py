"""Where the layers of a model lie: the lower ones over several devices, all else on the last of them.

Everything but the lower decoder layers (embeddings, scored layers, norm, head) lies on one device, so that the engine sees
no difference: a hidden state comes to it from below, and nothing of what it captures leaves the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch import nn
from transformers.pytorch_utils import Conv1D

OFFLOADED = -1  # in the place of a device's index
SHARE, LAST_SHARE = 0.85, 0.6  # of what is free: the last device holds directions and activations as well
NARROW = {"int8": 1.0, "int4": 0.5625}  # bytes of a parameter; 4 bits and a scale in float32 for each 64 of them
WIDE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DoesNotFit(ValueError):
    """The weights are too large for the devices; the message names the bytes and the remedies."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How a worker holds its model.

    ``devices``: the last one takes the batches. ``top``: how many decoder layers, from the last, lie there in the model's
    own dtype; None: all. ``lower_dtype``: auto (as the model's) | float32 | bfloat16 | int8 | int4, of the layers below.
    ``offload``: none | cpu | disk, where lower layers go that do not fit. ``device_bytes``: of weights that each device
    takes; None: a share of what is free.
    """

    devices: tuple[torch.device, ...]
    top: int | None = None
    lower_dtype: str = "auto"
    offload: str = "none"
    device_bytes: float | None = None

    @property
    def device(self) -> torch.device:
        """Where batches go, and where the scored layers and the head are."""
        return self.devices[-1]

    @property
    def whole(self) -> bool:
        """Whether the model lies on one device as it is."""
        as_it_is = self.lower_dtype == "auto" and self.offload == "none" and self.device_bytes is None
        return len(self.devices) == 1 and as_it_is

    def rooms(self) -> list[float]:
        """Bytes of weights that each device may take."""
        if self.device_bytes is not None:
            return [float(self.device_bytes)] * len(self.devices)
        return shares_of([_free(device) for device in self.devices])


def shares_of(free: Sequence[float]) -> list[float]:
    """Bytes of weights that devices with so many free bytes take where nothing bounds them."""
    return [room * SHARE for room in free[:-1]] + [free[-1] * LAST_SHARE]


def equal_rooms(count: int, weights: int) -> list[float]:
    """As ``shares_of`` for devices of one kind of which nothing is known but that together they hold ``weights`` bytes."""
    return shares_of([2.0 * max(1, weights)] * count)


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return float(get_max_memory().get(device.type, math.inf))


def split(lower: Sequence[int], rest: int, rooms: Sequence[float], offload: bool = False) -> list[int]:
    """The device of every lower layer, in order, by index; OFFLOADED for the first ones where not all fit.

    ``lower``: bytes of each layer; ``rest``: bytes of all else, which the last device holds. Each device is filled to the
    same share of its room, as nearly as whole layers allow. Raises DoesNotFit.
    """
    for left_out in range(len(lower) + 1 if offload else 1):
        free = list(rooms)
        if left_out:  # one of them at a time is brought to the first device
            free[0] -= max(lower[:left_out])
        found = _balanced(lower[left_out:], rest, free)
        if found is not None:
            return [OFFLOADED] * left_out + found
    raise DoesNotFit(_too_large(sum(lower), max(lower, default=0), rest, rooms, offload))


def _balanced(lower: Sequence[int], rest: int, rooms: Sequence[float]) -> list[int] | None:
    """Devices that rise with the layers, the fullest as empty as can be; None where they do not fit."""
    if min(rooms) < 0 or rest > rooms[-1]:
        return None
    # With no bound, shares are of the whole: bytes alone are balanced.
    sizes = [min(room, 2.0 * (sum(lower) + rest) + 1) for room in rooms]
    if (best := _filled(lower, rest, sizes, 1.0)) is None:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        found = _filled(lower, rest, sizes, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    before = len(best) - best.count(len(rooms) - 1)
    if len(rooms) > 1:  # the last one may be the fullest by what it has to hold: the others in balance among themselves
        best[:before] = _balanced(lower[:before], 0, rooms[:-1]) or best[:before]
    return best


def _filled(lower: Sequence[int], rest: int, sizes: Sequence[float], share: float) -> list[int] | None:
    """Layers in order onto devices in order, each up to ``share`` of its size."""
    left = [share * size for size in sizes]
    left[-1] -= rest
    if left[-1] < 0:
        return None
    found, device = [], 0
    for size in lower:
        while device < len(left) and left[device] < size:
            device += 1
        if device == len(left):
            return None
        left[device] -= size
        found.append(device)
    return found


def _too_large(lower: int, largest: int, rest: int, rooms: Sequence[float], offload: bool) -> str:
    several = f", each of the others {_said(rooms[0])}" if len(rooms) > 1 else ""
    held = f"the last device takes {_said(rooms[-1])} of weights{several} (model.device_bytes)"
    own = f"embeddings, top layers and head take {_said(rest)}"
    if rest > rooms[-1]:
        return (
            f"{own}, and {held}: take a device with more memory, fewer valuation.layers, or a larger model.device_bytes"
        )
    if offload:
        return (
            f"{own}, and the largest lower layer, for which there has to be room beside them, {_said(largest)}; {held}: take "
            "devices with more memory, or a larger model.device_bytes"
        )
    return (
        f"the weights take {_said(lower + rest)}, {_said(rest)} of them on the last device; {held}: set a larger "
        "cluster.gpus_per_worker, model.lower_dtype=int8 or int4, or model.offload=cpu or disk (slower: layers are copied "
        "for every pass)"
    )


def _said(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def sizes_of(
    lower: Sequence[nn.Module], model: nn.Module, lower_dtype: str, dtype: torch.dtype
) -> tuple[list[int], int]:
    """Bytes of every lower layer, and of all else, of a model that may lie on the meta device."""
    found = [_layer_bytes(layer, lower_dtype, dtype) for layer in lower]
    below = {id(parameter) for layer in lower for parameter in layer.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in below)
    return found, rest * dtype.itemsize


def _layer_bytes(layer: nn.Module, lower_dtype: str, dtype: torch.dtype) -> int:
    total, wide = 0.0, WIDE.get(lower_dtype, dtype).itemsize
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            narrow = lower_dtype in NARROW and quantised(module) and name == "weight"
            total += parameter.numel() * (NARROW[lower_dtype] if narrow else wide)
    return round(total)


def quantised(module: nn.Module) -> bool:
    """Whether an 8- or 4-bit layer holds this module's weight in so many bits: linear maps, not stacked experts."""
    return isinstance(module, nn.Linear | Conv1D)


def device_map(model: nn.Module, lower: Sequence[str], places: Sequence[Any], rest: Any) -> dict[str, Any]:
    """Module (or parameter that no submodule holds) -> device, as transformers and accelerate take it.

    ``lower``: the names of the lower layers, ``places``: what stands for the device of each; ``rest``: of all else.
    """
    of_layer = dict(zip(lower, places, strict=True))
    found: dict[str, Any] = {}

    def place(prefix: str, module: nn.Module) -> None:
        if prefix in of_layer:
            found[prefix] = of_layer[prefix]
        elif any(name.startswith(f"{prefix}." if prefix else "") for name in lower):
            for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                found[_joined(prefix, name)] = rest
            for name, child in module.named_children():
                place(_joined(prefix, name), child)
        else:
            found[prefix] = rest

    place("", model)
    return found


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def device_of(model: Any) -> torch.device:
    """Where batches belong: the device of the head, which is that of the scored layers."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.device.type != "meta":
        return weight.device
    return next(iter(reversed(list(model.parameters())))).device


def offloaded_layers(layers: Sequence[nn.Module]) -> int:
    """How many of them have weights that are brought to a device for every pass."""
    return sum(any(p.is_meta for p in layer.parameters()) for layer in layers)


def apart(model: Any, layers: Sequence[nn.Module]) -> str | None:
    """What is wrong with where a model lies whose ``layers`` are to be scored; None: they and the head are on one device.

    A model that is on the meta device as a whole is as good as on one.
    """
    devices = {p.device for p in model.parameters()}
    if len(devices) == 1:
        return None
    own = {str(p.device) for layer in layers for p in layer.parameters()} | {str(device_of(model))}
    if len(own) == 1 and "meta" not in own:
        return None
    offloaded = " (meta: offloaded)" if "meta" in own else ""
    return (
        f"the last {len(layers)} layers and the head lie on {', '.join(sorted(own))}{offloaded}: the last device of a device "
        "map has to hold them all; lower layers may lie anywhere"
    )

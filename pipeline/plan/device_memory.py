"""Bytes of a worker device by device, where its model is spread, offloaded or held in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from alphatoken.pipeline.maths.decoder import decoder_layers
from alphatoken.pipeline.maths.placement import OFFLOADED, DoesNotFit, equal_rooms, sizes_of, split
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.settings import Settings


def device_memory(
    model: nn.Module, dtype: torch.dtype, settings: Settings, worker: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One entry per device: its name, lower layers, bytes of weights, and on the last one all else that a worker holds.

    ``model``: on the meta device, in ``dtype``; ``worker``: bytes of the whole worker by what they are for. Where lower
    layers are offloaded one more entry says how many, and their bytes. A device holds what model.device_bytes says, or, as
    no device is looked at here, as much as it takes. Raises SettingsWrong where that is too little.
    """
    _, stack = decoder_layers(model)
    top, asked = settings.top_layers, settings.model.device_bytes
    lower = [] if top is None else list(stack[: max(0, len(stack) - top)])
    sizes, rest = sizes_of(lower, model, settings.lower_dtype, dtype)
    count = settings.cluster.devices_per_worker
    rooms = equal_rooms(count, sum(sizes) + rest) if isinstance(asked, str) else [float(asked)] * count
    try:
        places = split(sizes, rest, rooms, settings.model.offload != "none")
    except DoesNotFit as error:
        raise SettingsWrong([f"model.policy: {error}"]) from error
    found: list[dict[str, Any]] = []
    for device in range(count):
        own = [size for size, place in zip(sizes, places, strict=True) if place == device]
        found.append({"device": str(device), "lower_layers": len(own), "weights": sum(own)})
    found[-1]["weights"] += rest
    found[-1] |= {name: count for name, count in worker.items() if name != "weights"}
    away = [size for size, place in zip(sizes, places, strict=True) if place == OFFLOADED]
    if away:
        found[0]["weights"] += max(away)  # one of them at a time
        found.append({"device": settings.model.offload, "lower_layers": len(away), "weights": sum(away)})
    return found


def is_laid_out(settings: Settings) -> bool:
    """Whether a worker's model lies otherwise than whole on one device in one dtype."""
    own = settings.model
    return (
        settings.cluster.devices_per_worker > 1
        or settings.lower_dtype != "auto"
        or own.offload != "none"
        or own.device_bytes != "auto"
    )

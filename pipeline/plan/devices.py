"""Device-hours for a few accelerators, by what their makers state, and money where plan.price says what an hour costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alphatoken.pipeline.plan.cpu import CPU_HERE
from alphatoken.pipeline.run.failure import SettingsWrong

UTILISATION = 0.35
# Dense bfloat16 with float32 accumulation, in operations per second, as their makers state it.
ACCELERATORS = {
    "NVIDIA H100 SXM": 989e12, "NVIDIA A100": 312e12, "NVIDIA L40S": 362e12, "NVIDIA RTX 4090": 165e12,
    "AMD MI300X": 1307e12,
}  # fmt: skip
BILLION = 1e9


@dataclass(frozen=True, slots=True)
class Here:
    """A device of this machine: ``seconds`` that the run takes on it, ``value_rate``: operations per second of its value pass."""

    device: str
    seconds: float
    value_rate: float


def device_here() -> str:
    """The device of this machine that a run would use."""
    return "the GPU of this machine" if torch.cuda.is_available() else CPU_HERE


def device_hours(
    total: float, value: float, tokens: int, here: Here, price: Any, several: int = 1
) -> dict[str, Any]:  # fmt: skip
    """The plan's ``device_hours`` and ``per_billion_tokens``.

    ``total``, ``value``: operations of the run and of its value stage, ``tokens``: of the data, of which the value stage is the
    part that grows. ``price``: plan.price. ``several``: accelerators of a worker, of which one computes at a time. Raises
    SettingsWrong for a price of a device that is none of them.
    """
    rates = {name: peak * UTILISATION / several for name, peak in ACCELERATORS.items()}
    hours = {name: total / rate / 3600 for name, rate in rates.items()} | {here.device: here.seconds / 3600}
    rates[here.device] = here.value_rate
    each = {name: value / max(1, tokens) * BILLION / rate / 3600 for name, rate in rates.items()}
    found: dict[str, Any] = {"device_hours": {"utilisation": UTILISATION, **hours}, "per_billion_tokens": each}
    if prices := _prices(price, list(rates)):
        found["price"] = {
            name: {"per_hour": one, "run": one * hours[name], "per_billion_tokens": one * each[name]}
            for name, one in prices.items()
        }
    return found


def _prices(price: Any, devices: Sequence[str]) -> dict[str, float]:
    """Device -> what an hour of it costs, of those that have a price."""
    if not isinstance(price, dict):
        return {} if price is None else dict.fromkeys(devices, float(price))
    found: dict[str, float] = {}
    for part, one in price.items():
        meant = [name for name in devices if str(part).lower() in name.lower()]
        if not meant:
            raise SettingsWrong([f"plan.price.{part}: is no part of a device's name; devices: {', '.join(devices)}"])
        found |= dict.fromkeys(meant, float(one))
    return found

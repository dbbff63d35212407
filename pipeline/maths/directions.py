"""Directions: one matrix per scored linear map, in the shape in which the model stores the weight.

A token's value is linear in its direction (`information` is quadratic). Two matter: adaptation G (the validation gradient) and stability
V = F * (W - W_ref) (the Fisher-drift proxy, Eq. 10).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

NAMES = ("adaptation", "stability")


@dataclass(frozen=True, slots=True)
class Directions:
    """Named directions at one point of a trajectory.

    ``named``: direction name -> parameter name -> tensor. ``weights``: the scored weights at that point where they are
    not the model's own (a warm-up's end); None: the model's own.
    """

    named: Mapping[str, Mapping[str, torch.Tensor]]
    weights: Mapping[str, torch.Tensor] | None = None

    @classmethod
    def load(cls, directory: str | Path) -> Directions:
        """Read ``adaptation.safetensors``, ``stability.safetensors``, those of further objectives, and ``policy.safetensors``
        where present.

        ``directory``: a local one, such as RUN/anchors/snapshot-00. Raises FileNotFoundError naming what is missing.
        """
        place = Path(directory)
        missing = [name for name in NAMES if not (place / f"{name}.safetensors").is_file()]
        if missing:
            raise FileNotFoundError(f"{place} has no {missing[0]}.safetensors: run `alphatoken anchor` first")
        others = sorted(file.stem for file in place.glob("*.safetensors") if file.stem not in (*NAMES, "policy"))
        named = {name: safetensors.torch.load_file(place / f"{name}.safetensors") for name in (*NAMES, *others)}
        policy = place / "policy.safetensors"
        weights = safetensors.torch.load_file(policy) if policy.is_file() else None
        return cls(named, weights)

    def check(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError unless every direction, and the policy's own weights, have the parameters and shapes of ``weights``."""
        policy = {} if self.weights is None else {"policy": self.weights}
        for direction, tensors in {**self.named, **policy}.items():
            missing, unknown = sorted(weights.keys() - tensors.keys()), sorted(tensors.keys() - weights.keys())
            if missing or unknown:
                raise ValueError(
                    f"direction {direction} is not for these scored layers: missing {missing[:3]}, unknown {unknown[:3]}; "
                    "was it made with another model or another valuation.layers?"
                )
            for name, tensor in tensors.items():
                if tensor.shape != weights[name].shape:
                    raise ValueError(
                        f"direction {direction}: {name} has shape {tuple(tensor.shape)}, the weight {tuple(weights[name].shape)}"
                    )


def scale_for(dtype: torch.dtype, direction: Iterable[torch.Tensor]) -> float:
    """What a direction is multiplied by before it is rounded to a model's ``dtype``: a power of two, by which its values are
    divided again; 1 but for float16.

    Entries of a Fisher drift are often below 6e-8, the least that float16 knows. The scale brings their root mean square to
    about 2^-10, and none above 8, so that sums of 65,504 and more do not come near.
    """
    if dtype != torch.float16:
        return 1.0
    squares, count, largest = 0.0, 0, 0.0
    for tensor in direction:
        squares += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
        count, largest = count + tensor.numel(), max(largest, float(tensor.abs().max()))
    if not (0.0 < squares < math.inf and largest < math.inf):
        return 1.0
    return 2.0 ** math.floor(min(-10 - math.log2(math.sqrt(squares / count)), 3 - math.log2(largest)))


def rounded(tensor: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """``tensor`` times ``scale`` in device and dtype of ``weight``."""
    return (tensor if scale == 1.0 else tensor.float() * scale).to(weight.device, weight.dtype)


def fisher_drift(fisher: torch.Tensor, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """V = F * (W - W_ref), elementwise in float32 (Eq. 10); all of the weight's shape."""
    return fisher.float() * (policy.float() - reference.float())

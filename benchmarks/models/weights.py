"""Random weights at which every part of a small model matters; the tests of the engine use them as well."""

from __future__ import annotations

import torch
from torch import nn


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Weights at which every part matters: no gain is one, no bias or sink zero, attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim < 2 or name.endswith("bias"):
                parameter.add_(0.3 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.3 * noise / min(parameter.shape[-2:]) ** 0.5)
    return model.eval()

"""The lower layers once: several passes over one batch share the hidden state that enters the first scored layer.

Snapshots of a trajectory differ in the scored weights alone, and so do the tangents of the exact estimator, so what
comes below need not be computed again for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.maths.decoder import ScoredLayers


@contextmanager
def lower_layers_once(scored: ScoredLayers) -> Iterator[None]:
    """Inside the block, only the first pass runs the layers below the scored ones; every pass must be of one batch.

    The decoder's own forward still runs (embeddings, masks, positions), with lower layers that hand through.
    """
    kept: list[torch.Tensor] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not kept:
            kept.append(hidden.detach())
            for layer in scored.lower:
                layer.forward = _hand_through
            return None
        return ((kept[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept[0]})

    hook = scored.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for layer in scored.lower:
            if "forward" in vars(layer):
                del layer.forward


def _hand_through(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return hidden_states

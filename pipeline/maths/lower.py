"""The lower layers once: several passes over one batch share the hidden state that enters the first scored layer.

Snapshots of a trajectory differ in the scored weights alone, and so do tangents along several directions, so what
comes below need not be computed again for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import nn

_IN_TUPLES: WeakSet[nn.Module] = WeakSet()  # layers that return the hidden state with something beside it


class Layers(Protocol):
    """Scored layers and those below them; ScoredLayers is one.

    ``shared``: whether the hidden state is all that the lower layers hand on. Some models share keys and values between
    layers, or a router's state; for them every pass runs whole.
    """

    @property
    def layers(self) -> Sequence[nn.Module]: ...

    @property
    def lower(self) -> Sequence[nn.Module]: ...

    @property
    def shared(self) -> bool: ...


@contextmanager
def lower_layers_once(scored: Layers, kept: list[torch.Tensor] | None = None) -> Iterator[None]:
    """Inside the block, only the first pass runs the layers below the scored ones; every pass must be of one batch.

    The decoder's own forward still runs (embeddings, masks, positions), with lower layers that hand through. ``kept``:
    an empty list, where the hidden state that enters the first scored layer is left; or one in which a block over the
    same batch has left it, and then no pass runs the lower layers. A pass of another shape runs them as ever: the
    search for the origin of a NaN goes row by row.
    """
    if not scored.shared or not scored.layers:  # of a model that is only run forward, no layer is scored
        yield
        return
    kept = [] if kept is None else kept

    def is_kept(hidden: torch.Tensor) -> bool:
        return bool(kept) and hidden.shape == kept[0].shape

    def handing_through(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def hand_through(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> Any:
            if is_kept(hidden_states):
                return (hidden_states, None) if layer in _IN_TUPLES else hidden_states
            found = forward(hidden_states, *args, **kwargs)
            if isinstance(found, tuple):
                _IN_TUPLES.add(layer)
            return found

        return hand_through

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not kept:
            kept.append(hidden.detach())
            return None
        if not is_kept(hidden):
            return None
        return ((kept[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept[0]})

    own = [vars(layer).get("forward") for layer in scored.lower]
    for layer in scored.lower:
        layer.forward = handing_through(layer, layer.forward)
    hook = scored.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for layer, before in zip(scored.lower, own, strict=True):
            del layer.forward
            if before is not None:
                layer.forward = before

"""Attention that yields its band: the probabilities A[k, p] with which a position p reaches the next W positions k.

For one block of code the functions that transformers' attention interface knows by the model's own implementation name
(sdpa, eager, flash_attention_2) are ours, so that query, key and value of every architecture that uses it are seen while
the model goes on as under that name: some models build their masks by it. The output comes from the fused kernel; the
band is computed block by block from query and key, in memory linear in the sequence length (identity 4 of the method).
Where a model has no fused kernel (soft-capped logits, attention sinks) the same blocks give the output as well, and where
query, key and value are dual numbers (tangents.py) they give its derivative, whatever the kernel.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alphatoken.pipeline.maths.attention_blocks import Attended, AttentionBlocks, BandBlock, Moved
from alphatoken.pipeline.maths.decoder import UnsupportedModel
from alphatoken.pipeline.maths.tangents import tangent_of, usual_kernels, without_tangent

KERNELS = ("sdpa", "flash_attention_2", "eager")

_active = threading.local()  # kernel, listener and held of the forward pass that runs in this thread
_lock = threading.Lock()
_blocks_of_code = 0  # how many threads are inside `intercepted`
_originals: dict[str, Callable | None] = {}


Listener = Callable[[nn.Module, torch.Tensor, Callable[[int], list[BandBlock]]], None]


@contextmanager
def intercepted(decoder: Any, kernel: str, listener: Listener | None, held: bool = False) -> Iterator[None]:
    """Route the attention of a model's ``decoder`` through this file for one block of code.

    ``kernel`` (sdpa | flash_attention_2 | eager) computes the outputs; eager: block by block, and so it is where the
    model supports nothing else; ``held``: the blocks' probabilities are held for the backward pass. ``listener(module,
    value, band)`` is called at every attention module: ``value`` (batch, heads, length, head size) as the kernel sees it,
    ``band(W)`` computes the blocks of the band. Attention implementation and listener are as before when the block is left.
    Raises ValueError for an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention={kernel}: must be one of {', '.join(KERNELS)}")
    saved = getattr(_active, "state", None)
    with _named(decoder, kernel):
        _install()
        _active.state = (kernel, listener, held)
        try:
            yield
        finally:
            _active.state = saved
            _uninstall()


@contextmanager
def _named(decoder: Any, kernel: str) -> Iterator[None]:
    """The decoder's implementation name is that of the kernel; for blocks, whichever builds the smaller masks."""
    wanted = "sdpa" if kernel == "eager" else kernel
    if wanted == "sdpa" and not getattr(decoder, "_supports_sdpa", True):
        wanted = "eager"
    config = getattr(decoder, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before == wanted or not hasattr(decoder, "set_attn_implementation"):
        yield
        return
    try:
        decoder.set_attn_implementation(wanted)
    except (ImportError, ValueError) as error:
        reason = str(error).partition(". ")[0]
        raise UnsupportedModel(f"attention={kernel} cannot be used: {reason}; set model.attention=sdpa") from error
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _install() -> None:
    global _blocks_of_code
    with _lock:
        if not _blocks_of_code:
            for name in KERNELS:
                _originals[name] = ALL_ATTENTION_FUNCTIONS.get(name)
                ALL_ATTENTION_FUNCTIONS[name] = partial(_attention, name)
        _blocks_of_code += 1


def _uninstall() -> None:
    global _blocks_of_code
    with _lock:
        _blocks_of_code -= 1
        if not _blocks_of_code:
            for name in KERNELS:
                del ALL_ATTENTION_FUNCTIONS[name]
                original = _originals[name]
                if original is not None and ALL_ATTENTION_FUNCTIONS.get(name) is not original:
                    ALL_ATTENTION_FUNCTIONS[name] = original  # somebody had replaced it as we do


def _original(name: str, module: nn.Module) -> Callable | None:
    """What the model would call under its implementation's name: eager functions stand in the model's own file."""
    return _originals[name] or getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


# Keywords that change what attention computes and that the blocks know, by implementation; sdpa heeds no others.
_UNDERSTOOD = {
    "sdpa": {"is_causal", "position_bias"},
    "eager": {"softcap", "s_aux", "sinks", "position_bias"},
    "flash_attention_2": {"is_causal", "sliding_window", "softcap"},
}
_HARMLESS = {
    "module", "query", "key", "value", "attention_mask", "dropout", "scaling", "output_attentions", "use_cache",
    "sliding_window", "is_causal", "cache_position", "position_ids", "kwargs", "target_dtype", "implementation",
}  # fmt: skip


@lru_cache(maxsize=256)
def _heeded(function: Callable) -> frozenset[str]:
    """The keywords that an attention function takes by name."""
    return frozenset(inspect.signature(function).parameters)


def _refuse_unknown(name: str, module: nn.Module, original: Callable | None, given: dict[str, Any]) -> None:
    heeded = _heeded(original) if original is not None else frozenset(given)
    unknown = [k for k, v in given.items() if v is not None and k in heeded and k not in _UNDERSTOOD[name] | _HARMLESS]
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} hands {unknown[0]} to its attention, which the engine does not know: its values "
            "would be wrong"
        )


def _attention(
    name: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Stands for the function ``name``; query (batch, heads, length, size), key and value with their own heads."""
    original = _original(name, module)
    state = getattr(_active, "state", None)
    if state is None:  # a model of another thread
        assert original is not None
        return original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given)
    kernel, listener, held = state
    _refuse_unknown(name, module, original, given)
    parts, moved = _taken_apart(query, key, value, given.get("position_bias"), attention_mask, _sinks(name, given))
    attended = _attended(name, module, parts, scaling, given)
    blocks = AttentionBlocks(attended, moved)
    if listener is not None:
        listener(module, attended.value, blocks.band)
    if kernel == "eager" or name == "eager":
        output = attended.output(held)
    else:
        assert original is not None
        plain = {**given, **({"position_bias": parts[3]} if "position_bias" in given else {})}
        with usual_kernels():
            output, _ = original(
                module, *parts[:3], parts[4], dropout=dropout, scaling=scaling, **plain
            )  # fmt: skip
    return (output if moved is None else forward_ad.make_dual(output, blocks.derivative())), None


def _sinks(name: str, given: dict[str, Any]) -> torch.Tensor | None:
    if name != "eager":
        return None
    return given["s_aux"] if given.get("s_aux") is not None else given.get("sinks")


def _attended(name: str, module: nn.Module, parts: list[Any], scaling: float | None, given: dict[str, Any]) -> Attended:
    query, key, value, bias, mask, sinks = parts
    causal = given.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    return Attended(
        query, key, value,
        mask=mask if mask is not None and mask.ndim == 4 else None,
        bias=bias,
        sinks=sinks,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=None if name == "sdpa" else given.get("softcap"),
        window=given.get("sliding_window"),
        causal=name != "eager" and bool(causal),  # eager functions know no other mask than the one they are given
    )  # fmt: skip


def _taken_apart(*tensors: torch.Tensor | None) -> tuple[list[Any], Moved | None]:
    """Values, with their graph, and derivatives of dual numbers; None where no tensor has one.

    ``tensors``: query, key, value, bias, mask, sinks.
    """
    values = [None if tensor is None else without_tangent(tensor) for tensor in tensors]
    tangents = [None if tensor is None or not tensor.is_floating_point() else tangent_of(tensor) for tensor in tensors]
    if all(tangent is None for tangent in tangents):
        return values, None
    query, key, value = (
        torch.zeros_like(v) if t is None else t for v, t in zip(values[:3], tangents[:3], strict=True) if v is not None
    )
    added = [tangent for tangent in tangents[3:5] if tangent is not None]
    bias = sum(added[1:], added[0]) if added else None
    return values, Moved(query, key, value, bias, tangents[5])

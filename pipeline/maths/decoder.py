"""What is scored: every linear map inside the last K decoder layers that a short pass sees applied once per position.

Embeddings and the LM head lie outside the decoder layers and are not scored. The decoder is the module below the head
that holds the input embeddings, so that of an image-text model it is the text decoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from alphatoken.pipeline.maths.frozen import frozen
from alphatoken.pipeline.maths.linear_maps import LinearMap, linear_maps_of
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.placement import apart, device_of

PROBE = 8  # tokens of the short pass


class UnsupportedModel(ValueError):
    """The engine cannot score this model; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the scored layers is scored, in matrix parameters; vectors (norm gains, biases) are no linear maps."""

    scored: int
    total: int
    left_out: tuple[str, ...]
    vectors: int

    @property
    def fraction(self) -> float:
        """Scored matrix parameters / matrix parameters of the scored layers."""
        return self.scored / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class ScoredLayers:
    """The last K decoder layers of a model: the layers, their linear maps in order, and the coverage.

    ``lower``: the layers below; ``shared``: whether passes over one batch may share what leaves them (lower.py).
    """

    model: nn.Module = field(repr=False)
    decoder: nn.Module = field(repr=False)
    layers: tuple[nn.Module, ...] = field(repr=False)
    lower: tuple[nn.Module, ...] = field(repr=False)
    maps: tuple[LinearMap, ...]
    coverage: Coverage
    shared: bool = True

    def weights(self) -> dict[str, torch.Tensor]:
        """The scored weights by parameter name, in the shapes in which the model stores them."""
        return {scored.name: scored.parameter.detach() for scored in self.maps}

    def layer_of(self) -> dict[nn.Module, int]:
        """Submodule -> index within ``layers``, for every submodule of a scored layer."""
        return {module: index for index, layer in enumerate(self.layers) for module in layer.modules()}


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that maps token ids to hidden states: the one below the LM head that holds the input embeddings."""
    ways: list[Any] = [getattr(model, "get_decoder", None), lambda: getattr(model, "base_model", None)]
    embeddings = _of(model, "get_input_embeddings")
    ways += [lambda child=child: child for child in model.children() if child is not embeddings]
    for way in ways:
        decoder = way() if way is not None else None
        if decoder is None or decoder is model or embeddings is None:
            continue
        if any(module is embeddings for module in decoder.modules()):
            # An image-text model may hold a whole causal LM.
            return decoder if _of(decoder, "get_output_embeddings") is None else decoder_of(decoder)
    raise UnsupportedModel(f"{type(model).__name__} has no decoder below a language-model head: load it as a causal LM")


def _of(model: Any, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers.

    Inside the decoder, the outermost module list as long as its configuration says; where none is, the one list of layers.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModel(f"{type(model).__name__} is not a transformers model: it has no configuration")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{type(model).__name__} is an encoder-decoder: only decoder-only models can be scored")
    if hasattr(model, "peft_config"):
        raise UnsupportedModel("this model is wrapped by PEFT: merge the adapter first (model.merge_and_unload())")
    decoder: Any = decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    own = getattr(decoder, "config", None) or config.get_text_config()
    count = getattr(own.get_text_config(), "num_hidden_layers", None)
    lists = [(n, m) for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    fitting = [item for item in lists if len(item[1]) == count] or [
        item for item in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in item[1])
    ]
    if not fitting:
        raise UnsupportedModel(f"{type(model).__name__} has no list of {count} decoder layers")
    least = min(name.count(".") for name, _ in fitting)
    outermost = [item for item in fitting if item[0].count(".") == least]
    if len(outermost) > 1:
        layered = [item for item in outermost if isinstance(item[1][0], GradientCheckpointingLayer)]
        outermost = layered if len(layered) == 1 else outermost
    if len(outermost) > 1:
        names = ", ".join(name for name, _ in outermost)
        raise UnsupportedModel(f"{type(model).__name__} has several stacks of layers ({names}): none is last")
    name, stack = outermost[0]
    return f"{prefix}.{name}", stack


def scored_layers(model: nn.Module, layers: int) -> ScoredLayers:
    """Find the linear maps of the last ``layers`` decoder layers of a causal language model.

    Passes a few tokens through its decoder. Raises UnsupportedModel with the reason for a model that cannot be scored
    (encoder-decoder, no language-model head, too few layers, no floating-point matrix in the scored layers).
    """
    name, stack = decoder_layers(model)
    if layers > len(stack):
        raise UnsupportedModel(f"valuation.layers={layers}, but {type(model).__name__} has {len(stack)} decoder layers")
    first = len(stack) - layers
    found: list[LinearMap] = []
    for index in range(layers):
        prefix = f"{name}.{first + index}"
        for path, module in stack[first + index].named_modules(prefix=prefix):
            found += linear_maps_of(path, module, index)
    if (wrong := apart(model, list(stack[first:]))) is not None:
        raise UnsupportedModel(f"{type(model).__name__}: {wrong}")
    below = {id(parameter) for layer in stack[:first] for parameter in layer.parameters()}
    uses = Counter(id(linear.parameter) for linear in found)
    # A block that several layers use, lower ones or scored ones, has one weight for all of them and no single input.
    found = [linear for linear in found if id(linear.parameter) not in below and uses[id(linear.parameter)] == 1]
    structure = ScoredLayers(
        model, decoder_of(model), tuple(stack[first:]), tuple(stack[:first]), tuple(found), Coverage(0, 0, (), 0)
    )
    if _is_meta(model):  # nothing can be run: what the structure says
        maps, shared = structure.maps, True
    else:
        maps, shared = _seen(structure)
    kept = [
        item for index in range(layers) for item in stored(stack[first + index], f"{name}.{first + index}")
    ]  # fmt: skip
    coverage = _coverage(maps, kept)
    if not maps:
        reason = (
            f"none of the {len(coverage.left_out)} matrices of the last {layers} layers is a plain floating-point linear "
            "map that is applied to every position"
        )
        remedy = "if it is quantised, load it unquantised"
        raise UnsupportedModel(f"{type(model).__name__}: {reason} (the first: {coverage.left_out[:1]}); {remedy}")
    return replace(structure, maps=maps, coverage=coverage, shared=shared)


def no_scored_layers(model: nn.Module) -> ScoredLayers:
    """A model that is only run forward: for scores that look at no layer, of any model with a language-model head."""
    return ScoredLayers(model, decoder_of(model), (), (), (), Coverage(0, 0, (), 0))


def _seen(scored: ScoredLayers) -> tuple[tuple[LinearMap, ...], bool]:
    """The maps that a short pass applies once to every position, and whether its lower layers can be handed on."""
    calls: Counter[nn.Module] = Counter()
    partial: set[nn.Module] = set()
    entering: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple, output: object) -> None:
        calls[module] += 1
        if not args or args[0].shape[:-1].numel() != PROBE:
            partial.add(module)

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack:
        stack.enter_context(frozen(scored.model))
        stack.enter_context(torch.no_grad())
        for m in scored.maps:
            if not m.experts:
                stack.callback(m.module.register_forward_hook(look).remove)
        with scored.layers[0].register_forward_pre_hook(enter, with_kwargs=True):
            whole = _last_hidden_state(scored)
        once = {module for module, count in calls.items() if count == 1} - partial
        maps = tuple(m for m in scored.maps if m.experts or m.module in once)
        if not scored.lower:
            return maps, True
        if len(entering) != 1:
            return maps, False  # looped layers
        try:
            with lower_layers_once(scored, entering):
                again = _last_hidden_state(scored)
        except UnsupportedModel:  # whatever a layer says that misses what another should have left
            return maps, False
    if not bool(torch.isfinite(whole).all()):
        return maps, True  # said where an example can be named
    return maps, bool(torch.allclose(again, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().mean())))


def _last_hidden_state(scored: ScoredLayers) -> torch.Tensor:
    device = device_of(scored.model)
    ids = torch.arange(1, PROBE + 1, device=device)[None]
    decoder: Any = scored.decoder
    with on_token_ids_alone(f"{type(scored.model).__name__}: its decoder"):
        return decoder(input_ids=ids, use_cache=False).last_hidden_state


@contextmanager
def on_token_ids_alone(what: str) -> Iterator[None]:
    """Whatever is raised inside the block means that ``what`` wants an image, a sound or another model's states."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedModel(f"{what} does not run on token ids alone ({type(error).__name__}: {reason})") from error


def _coverage(maps: tuple[LinearMap, ...], kept: list[tuple[str, torch.Tensor, bool]]) -> Coverage:
    scored = {id(m.parameter): m.parameter.numel() for m in maps}
    matrices, vectors, left_out = 0, 0, []
    for path, parameter, stacked in kept:
        if parameter.ndim - stacked < 2:
            vectors += parameter.numel()
            continue
        matrices += parameter.numel()
        if id(parameter) not in scored:
            left_out.append(path)
    return Coverage(sum(scored.values()), matrices, tuple(left_out), vectors)


def stored(layer: nn.Module, prefix: str) -> list[tuple[str, torch.Tensor, bool]]:
    """The parameters of a layer, and the integer buffers in which some quantisers keep their matrices.

    True: stacked, one per expert, so that a bias has two dimensions and a matrix three.
    """
    found = []
    for path, module in layer.named_modules(prefix=prefix):
        own = list(module.named_parameters(recurse=False)) + [
            (n, b)
            for n, b in module.named_buffers(recurse=False)
            if not b.is_floating_point() and b.dtype != torch.bool
        ]
        deepest = max((tensor.ndim for _, tensor in own), default=0)
        found += [(f"{path}.{name}", tensor, deepest == 3 and len(own) > 1) for name, tensor in own]
    return found


def _is_meta(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "meta"

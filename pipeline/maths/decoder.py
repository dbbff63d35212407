"""What is scored: every linear map inside the last K decoder layers, found from the model and not from names.

A *linear map* is a matrix parameter that is applied to every position: `nn.Linear` (also behind a fused
query-key-value projection), transformers' `Conv1D`, and the stacked matrices of mixture-of-experts layers that go
through transformers' experts interface. Embeddings and the LM head lie outside the decoder layers and are not scored.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class UnsupportedModel(ValueError):
    """The engine cannot score this model; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class LinearMap:
    """One scored matrix (or stack of matrices, one per expert).

    ``name`` is the parameter's name in the model. ``transposed``: the parameter is stored ``(d_in, d_out)``.
    ``experts``: 0, or the number of stacked matrices.
    """

    name: str
    layer: int
    module: nn.Module = field(repr=False, compare=False)
    transposed: bool = False
    experts: int = 0

    @property
    def parameter(self) -> nn.Parameter:
        """The weight itself, in the shape in which the model stores it."""
        return getattr(self.module, self.name.rpartition(".")[2])

    @torch.no_grad()
    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """W h without a bias, (..., d_in) -> (..., d_out), of a map that is a single matrix."""
        return rows @ (self.parameter if self.transposed else self.parameter.mT)


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
    """The last K decoder layers of a model: the layers, their linear maps in order, and the coverage."""

    model: nn.Module = field(repr=False)
    layers: tuple[nn.Module, ...] = field(repr=False)
    lower: tuple[nn.Module, ...] = field(repr=False)
    maps: tuple[LinearMap, ...]
    coverage: Coverage

    @property
    def decoder(self) -> nn.Module:
        """The model without its LM head."""
        return decoder_of(self.model)

    def weights(self) -> dict[str, torch.Tensor]:
        """The scored weights by parameter name, in the shapes in which the model stores them."""
        return {scored.name: scored.parameter.detach() for scored in self.maps}

    def layer_of(self) -> dict[nn.Module, int]:
        """Submodule -> index within ``layers``, for every submodule of a scored layer."""
        return {module: index for index, layer in enumerate(self.layers) for module in layer.modules()}


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that maps token ids to hidden states: the model without its LM head."""
    getter: Any = getattr(model, "get_decoder", None)
    decoder = getter() if getter is not None else getattr(model, "base_model", None)
    if decoder is None or decoder is model:
        raise UnsupportedModel(
            f"{type(model).__name__} has no decoder below a language-model head: load it as a causal LM"
        )
    return decoder


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the outermost module list as long as the configuration says."""
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModel(f"{type(model).__name__} is not a transformers model: it has no configuration")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{type(model).__name__} is an encoder-decoder: only decoder-only models can be scored")
    if hasattr(model, "peft_config"):
        raise UnsupportedModel("this model is wrapped by PEFT: merge the adapter first (model.merge_and_unload())")
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UnsupportedModel(f"{type(model).__name__} has no list of {count} decoder layers")
    return min(lists, key=lambda item: item[0].count("."))


def scored_layers(model: nn.Module, layers: int) -> ScoredLayers:
    """Find the linear maps of the last ``layers`` decoder layers of a causal language model.

    Raises UnsupportedModel with the reason for a model that cannot be scored (encoder-decoder, no language-model head,
    too few layers, no floating-point matrix in the scored layers).
    """
    name, stack = decoder_layers(model)
    decoder_of(model)
    if layers > len(stack):
        raise UnsupportedModel(f"valuation.layers={layers}, but {type(model).__name__} has {len(stack)} decoder layers")
    first = len(stack) - layers
    _refuse_state_space(model, stack[first:])
    maps: list[LinearMap] = []
    for index in range(layers):
        prefix = f"{name}.{first + index}"
        for path, module in stack[first + index].named_modules(prefix=prefix):
            maps += _maps_of(path, module, index)
    scored = {id(m.parameter): m.parameter.numel() for m in maps}
    matrices, vectors, left_out = 0, 0, []
    for index in range(layers):
        for path, parameter in _stored(stack[first + index], f"{name}.{first + index}"):
            if parameter.ndim < 2 or path.endswith("bias"):
                vectors += parameter.numel()
                continue
            matrices += parameter.numel()
            if id(parameter) not in scored:
                left_out.append(path)
    if not maps:
        reason = (
            f"none of the {len(left_out)} matrices of the last {layers} layers is a plain floating-point linear map"
        )
        remedy = "if it is quantised, load it unquantised"
        raise UnsupportedModel(f"{type(model).__name__}: {reason} (the first: {left_out[:1]}); {remedy}")
    coverage = Coverage(sum(scored.values()), matrices, tuple(left_out), vectors)
    return ScoredLayers(model, tuple(stack[first:]), tuple(stack[:first]), tuple(maps), coverage)


def no_scored_layers(model: nn.Module) -> ScoredLayers:
    """A model that is only run forward: for scores that look at no layer, of any model with a language-model head."""
    decoder_of(model)
    return ScoredLayers(model, (), (), (), Coverage(0, 0, (), 0))


def _refuse_state_space(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Mamba's and RWKV's decay parameters mark a recurrence, in which a position's error has no attention to follow."""
    for layer in layers:
        for name, _ in layer.named_parameters():
            if name.rpartition(".")[2] in ("A_log", "time_decay"):
                raise UnsupportedModel(
                    f"{type(model).__name__} has state-space layers ({name}): only decoders with softmax attention can "
                    "be scored"
                )


def _stored(layer: nn.Module, prefix: str) -> list[tuple[str, torch.Tensor]]:
    """The parameters of a layer, and the integer buffers in which some quantisers keep their matrices."""
    buffers = [
        (n, b) for n, b in layer.named_buffers(prefix=prefix) if not b.is_floating_point() and b.dtype != torch.bool
    ]
    return [*layer.named_parameters(prefix=prefix), *buffers]


def _is_float(weight: object) -> TypeGuard[torch.Tensor]:
    """Whether a weight is stored in a dtype that is computed in; an 8-bit float is a code with a scale elsewhere."""
    return isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1


def _maps_of(path: str, module: Any, layer: int) -> list[LinearMap]:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear | Conv1D):
        if not _is_float(weight) or weight.ndim != 2:
            return []  # quantised: its stored shape is not that of a matrix; counted as left out
        if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
            return []  # a subclass that does something else with its weight, such as a router; counted as left out
        return [LinearMap(f"{path}.weight", layer, module, transposed=isinstance(module, Conv1D))]
    if is_stacked_experts(module):
        names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
        return [
            LinearMap(f"{path}.{name}", layer, module, module.is_transposed, getattr(module, name).shape[0])
            for name in names
        ]
    return []


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as stacked parameters that go through transformers' experts interface."""
    names = ("has_gate", "is_transposed", "has_bias", "_apply_gate", "down_proj")
    if not all(hasattr(module, name) for name in names):
        return False
    return _is_float(module.down_proj) and module.down_proj.ndim == 3

"""A model of any type of transformers, built small from its configuration class.

Every field of known meaning is shrunk by its name (sizes.py), in the configuration and in those that it holds; lists
with an entry per layer keep one of each kind. Where that does not give a model, special.py says what the type needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks.models.sizes import EXACT, FIRST_SPECIAL, LAYERS, heads_of, is_special, shrunk, tail
from benchmarks.models.special import SPECIAL, Nested
from benchmarks.models.weights import randomised

FILLED = {"num_key_value_heads": 2} | {n: EXACT[n] for n in ("head_dim", "num_experts_per_tok", "n_routed_experts")}
MOST_PARAMETERS = 12_000_000


class NotSmall(ValueError):
    """The type cannot be built small; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class ModelType:
    """A row of the survey: a model type in one of its classes."""

    name: str
    owner: str
    image: bool

    @property
    def title(self) -> str:
        """The type's name; with its class where the type has two."""
        return (
            self.name
            if not self.image or self.name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            else f"{self.name} (image)"
        )


def model_types() -> list[ModelType]:
    """Every causal and image-text model type of the installed transformers, once where both are one class."""
    causal = [ModelType(name, owner, False) for name, owner in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()]
    known = {(t.name, t.owner) for t in causal}
    image = [ModelType(name, owner, True) for name, owner in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()]
    return sorted(causal + [t for t in image if (t.name, t.owner) not in known])


def build(kind: ModelType) -> Any:
    """A small model of the type in evaluation mode, float64, weights random. Raises NotSmall."""
    owner = getattr(transformers, kind.owner, None)
    if owner is None:
        raise NotSmall(f"transformers has no {kind.owner}")
    try:
        config, count = _counted(owner, kind, fill=False)
    except Exception:
        try:  # with fields that have no usual value
            config, count = _counted(owner, kind, fill=True)
        except Exception as error:
            raise NotSmall(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    if count > MOST_PARAMETERS:
        raise NotSmall(f"{count:,} parameters with every known field at its smallest")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some gains and sinks start at random
        model = randomised(owner(config), 0).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped_mm, the default, knows no float64
    return model


def _counted(owner: Any, kind: ModelType, fill: bool) -> tuple[PreTrainedConfig, int]:
    """A configuration that the class can be made of, and the number of its parameters."""
    config = small_config(CONFIG_MAPPING[kind.name], SPECIAL.get(kind.name, {}), fill)
    accepted = owner.config_class
    if accepted is not None and not isinstance(config, accepted):
        inner = [v for v in vars(config).values() if isinstance(v, accepted)]
        config = inner[0] if inner else config  # a text model of a type that is configured with an image tower
    with torch.device("meta"):
        return config, sum(p.numel() for p in owner(config).parameters())


def small_config(config_class: type, changes: Mapping[str, Any], fill: bool = False) -> PreTrainedConfig:
    """A small configuration; ``changes``: field -> value, for a configuration that it holds ``Nested`` ones.

    ``fill``: fields that stay None in the usual configuration get a size as well.
    """
    plain = {k: v for k, v in changes.items() if not isinstance(v, Nested)}
    try:
        usual = config_class()
    except Exception:
        usual = None
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            fields[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            fields[field.name] = field.default_factory()
    heads, layers = heads_of(fields), _layers_of(usual)
    given: dict[str, Any] = {}
    special = FIRST_SPECIAL
    for name, value in fields.items():
        nested = changes.get(name)
        nested = dict(nested) if isinstance(nested, Nested) else {}
        named = nested.pop("model_type", None)
        inner = type(vars(usual).get(name)) if usual is not None else CONFIG_MAPPING[named] if named else None
        if inner is not None and issubclass(inner, PreTrainedConfig):
            given[name] = small_config(inner, nested, fill)
        elif is_special(name) and isinstance(value, int):
            given[name], special = (0 if name == "pad_token_id" else special), special + 1
        elif is_special(name) and isinstance(value, list | tuple):
            given[name], special = [special], special + 1
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            given[name] = shrunk(name, value, heads)
        elif isinstance(value, list | tuple) and layers > LAYERS and len(value) == layers:
            given[name] = tail(list(value))
        elif isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
            given[name] = type(value)(shrunk(name.removesuffix("s"), v, heads) for v in value)
        elif fill and value is None and name in FILLED:
            given[name] = FILLED[name]
    given |= plain
    small = config_class(**given)
    again = {} if usual is None else _missing_kinds(usual, small, layers, changes)
    return config_class(**(given | again)) if again else small


def _layers_of(config: Any) -> int:
    count = getattr(config, "num_hidden_layers", None)
    return count if isinstance(count, int) else 0


def _missing_kinds(usual: Any, small: Any, layers: int, changes: Mapping[str, Any]) -> dict[str, list]:
    """Lists of layer kinds, derived by the configuration itself, that lost a kind with the number of layers."""
    found = {}
    for name, value in vars(usual).items():
        less = vars(small).get(name)
        if name in changes or not isinstance(value, list) or not isinstance(less, list) or len(value) != layers:
            continue
        if value and isinstance(value[0], str) and set(value) - set(less) and len(less) == LAYERS:
            found[name] = tail(list(value))
    return found

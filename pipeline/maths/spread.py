"""Load a model over several devices, with lower layers in fewer bits, or offloaded; see placement.py for where they go.

transformers loads every weight where the map says; accelerate brings weights that are offloaded to their device for the
time of a layer. Nothing else of accelerate's hooks stays: a hidden state crosses to the device and dtype of a layer in one
hook of that layer, and what lies on the last device runs as in a model that lies there whole.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import send_to_device
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from alphatoken.pipeline.maths.decoder import UnsupportedModel, decoder_layers
from alphatoken.pipeline.maths.model_source import UnreadableModel
from alphatoken.pipeline.maths.placement import NARROW, OFFLOADED, WIDE, Placement, device_map, sizes_of, split

PACKAGE = "bitsandbytes"  # of 8- and 4-bit lower layers


class Spread:
    """Where the modules of one kind of model go. Raises UnsupportedModel, UnreadableModel and DoesNotFit.

    ``kind``: an auto class of transformers; ``dtype``: of all but the lower layers, or "auto".
    """

    def __init__(
        self, kind: Any, config: Any, dtype: torch.dtype | str, placement: Placement, trusted: bool = False
    ) -> None:
        self.kind, self.placement, self.dtype = kind, placement, dtype
        self.quantised = placement.lower_dtype in NARROW
        if placement.offload == placement.device.type:
            raise UnreadableModel(
                f"model.offload={placement.offload}: that is where the whole model lies already: set model.offload=disk"
            )
        if getattr(config, "quantization_config", None) is not None:
            raise UnreadableModel(
                "cluster.gpus_per_worker above 1, model.lower_dtype, model.offload and model.device_bytes take checkpoints that are "
                "not quantised: give the original one, with model.lower_dtype=int8 or int4, or leave them out"
            )
        if self.quantised:
            check_quantiser(placement)
        stored = dtype if isinstance(dtype, torch.dtype) else config.get_text_config().dtype or torch.bfloat16
        with torch.device("meta"):
            model = kind.from_config(config, dtype=stored, trust_remote_code=trusted)
        name, stack = decoder_layers(model)
        count = 0 if placement.top is None else max(0, len(stack) - placement.top)
        _refuse_shared(model, stack, count)
        self.lower = [f"{name}.{index}" for index in range(count)]
        self.stack, self.first_top = name, count
        sizes, rest = sizes_of(list(stack[:count]), model, placement.lower_dtype, stored)
        self.places = split(sizes, rest, placement.rooms(), placement.offload != "none")
        self.map = device_map(model, self.lower, [self._key(i) for i in self.places], _key_of(placement.device))
        wide = WIDE.get(placement.lower_dtype)
        self.lower_dtype = wide if self.lower and wide != stored else None  # where it is another than that of the rest

    @property
    def offloaded(self) -> int:
        """How many lower layers are brought to a device for every pass."""
        return self.places.count(OFFLOADED)

    def load(self, path: str, arguments: dict[str, Any]) -> PreTrainedModel:
        """The model of a directory or hub id, laid out."""
        more = dict(arguments)
        if self.quantised and self.lower:
            more["quantization_config"] = self._bits()
        with _quiet(), _Folder(self.offloaded > 0) as folder:
            model = self._read(path, self.lower_dtype or self.dtype, self.map, folder, more)
            if self.lower_dtype is not None:
                self._widen(model, path, more)
            folder.belongs_to(model)
        return self._settled(model)

    def spread(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model that is in this process's memory already, such as one that an adapter was merged into, laid out."""
        if self.lower_dtype is not None:
            for layer in self._layers(model)[: self.first_top]:
                layer.to(self.lower_dtype)
        with _quiet(), _Folder(self.offloaded > 0) as folder:
            skipped = model._skip_keys_device_placement
            dispatch_model(model, self.map, offload_dir=folder.path, skip_keys=skipped)  # type: ignore[arg-type]  # a list as well
            folder.belongs_to(model)
        return self._settled(model)

    def _key(self, place: int) -> Any:
        return self.placement.offload if place == OFFLOADED else _key_of(self.placement.devices[place])

    def _read(self, path: str, dtype: Any, where: Any, folder: _Folder, more: dict[str, Any]) -> PreTrainedModel:
        return self.kind.from_pretrained(path, dtype=dtype, device_map=where, offload_folder=folder.path, **more)

    def _bits(self) -> BitsAndBytesConfig:
        """Everything but the lower layers stays as it is.

        In 8 bits every token is quantised by itself: with a threshold, columns are kept in 16 bits where any token of the
        batch is large, so that a token would see what follows it and what else is in its batch.
        """
        kept = [name.replace(".", r"\.") for name in self.map if name not in self.lower]
        eight = self.placement.lower_dtype == "int8"
        return BitsAndBytesConfig(
            load_in_8bit=eight, load_in_4bit=not eight, llm_int8_skip_modules=kept, llm_int8_threshold=0.0, bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip

    @torch.no_grad()
    def _widen(self, model: PreTrainedModel, path: str, more: dict[str, Any]) -> None:
        """Read all but the lower layers once more, in their own dtype; transformers has one dtype for a whole model.

        The lower layers are named as offloaded, so that they are not read again.
        """
        where = {name: "disk" if name in self.lower else place for name, place in self.map.items()}
        with _Folder(True) as second:
            wide = self._read(path, self.dtype, where, second, more)
            own = dict(model.named_parameters()) | dict(model.named_buffers())
            for name, tensor in [*wide.named_parameters(), *wide.named_buffers()]:
                if not name.startswith(tuple(f"{layer}." for layer in self.lower)):
                    own[name].data = tensor.data
        model.tie_weights()

    def _layers(self, model: nn.Module) -> nn.ModuleList:
        found = model.get_submodule(self.stack)
        assert isinstance(found, nn.ModuleList)
        return found

    def told(self) -> str:
        """Where the lower layers are, for people."""
        named = [
            f"offloaded to {self._key(p)}" if p == OFFLOADED else str(self.placement.devices[p]) for p in self.places
        ]
        where = ", ".join(f"{named.count(name)} {name}" for name in dict.fromkeys(named))
        dtype = self.placement.lower_dtype
        return f"lower layers{'' if dtype == 'auto' else f' in {dtype}'}: {where or 'none'}; all else: {self.placement.device}"

    def _settled(self, model: PreTrainedModel) -> PreTrainedModel:
        layers = self._layers(model)
        lower = layers[: self.first_top]
        offloaded = [layer for layer, place in zip(lower, self.places, strict=True) if place == OFFLOADED]
        executed = [
            _executed(layer) if place == OFFLOADED else self.placement.devices[place]
            for layer, place in zip(lower, self.places, strict=True)
        ]
        kept = {module for layer in offloaded for module in layer.modules()}
        for module in model.modules():
            if module not in kept:
                _unhooked(module)
            elif (hook := getattr(module, "_hf_hook", None)) is not None:
                # accelerate knows tied weights by their addresses, which others may get where these were read anew: an
                # offloaded weight at such an address would be taken for another one.
                hook.tied_params_map, hook.tied_params_names = None, set()
        lower.requires_grad_(False)
        skipped = model._skip_keys_device_placement
        for layer, device in zip(lower, executed, strict=True):
            _crossing(layer, device, self.lower_dtype, skipped)
        if lower:
            dtype = None if self.lower_dtype is None else next(layers[self.first_top].parameters()).dtype
            _crossing(layers[self.first_top], self.placement.device, dtype, skipped)
        logging.getLogger("alphatoken").info(self.told())
        return model


def _refuse_shared(model: nn.Module, stack: nn.ModuleList, count: int) -> None:
    below = {id(parameter) for layer in stack[:count] for parameter in layer.parameters()}
    if any(id(parameter) in below for layer in stack[count:] for parameter in layer.parameters()):
        raise UnsupportedModel(
            f"{type(model).__name__}: its last layers use weights of lower ones, so that all of it has to lie on one device "
            "in one dtype: leave cluster.gpus_per_worker, model.lower_dtype and model.offload as they are by default"
        )


def check_quantiser(placement: Placement) -> None:
    """Raise UnreadableModel where lower layers cannot be held in 8 or 4 bits, with the remedy."""
    asked = f"model.lower_dtype={placement.lower_dtype}"
    if find_spec(PACKAGE) is None:
        raise UnreadableModel(f"{asked} needs {PACKAGE}, which is not installed: pip install {PACKAGE}")
    import bitsandbytes  # one of its extras, and slow to import

    able = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    kind = placement.device.type
    if kind not in able:
        raise UnreadableModel(
            f"{asked}: {PACKAGE} {_version()} does not run on a {kind}: install a newer one, take a GPU, or set "
            "model.lower_dtype=bfloat16"
        )


def _version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "(of unknown version)"


def _key_of(device: torch.device) -> Any:
    """As accelerate takes it: numbers have an order of their own in a set, from which it picks its main device."""
    return (device.index or 0) if device.type == "cuda" else str(device)


def _executed(layer: Any) -> torch.device:
    """Where accelerate brings an offloaded layer."""
    return torch.device(layer._hf_hook.execution_device)


def _unhooked(module: nn.Module) -> None:
    remove_hook_from_module(module)
    own = vars(module).get("forward")
    if getattr(own, "__func__", None) is type(module).forward:  # left there by accelerate in the place of its own
        del module.forward


def _crossing(layer: nn.Module, device: torch.device, dtype: torch.dtype | None, skipped: Any) -> None:
    """Bring what ``layer`` is given to its device and dtype; caches, ``skipped``, lie with their layers."""

    def cross(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = send_to_device(args, device), send_to_device(kwargs, device, skip_keys=skipped)
        return (args, kwargs) if dtype is None else (_cast(args, dtype), _cast(kwargs, dtype))

    layer.register_forward_pre_hook(cross, with_kwargs=True)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in tuples, lists and dictionaries in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(one, dtype) for one in value)
    return {key: _cast(one, dtype) for key, one in value.items()} if type(value) is dict else value


@contextmanager
def _quiet() -> Iterator[None]:
    """accelerate warns that what was to be offloaded is; the value stage counts it. bitsandbytes warns at every product."""
    logging.getLogger(f"{PACKAGE}.autograd._functions").setLevel(logging.ERROR)
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Folder:
    """A directory for weights that have to be written anew to be offloaded; those of safetensors are read where they are."""

    def __init__(self, wanted: bool) -> None:
        self.path = tempfile.mkdtemp(prefix="alphatoken-offloaded-") if wanted else None
        self.kept = False

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None and not self.kept:
            shutil.rmtree(self.path, ignore_errors=True)

    def belongs_to(self, model: nn.Module) -> None:
        """Let it stay as long as the model, where anything was written."""
        if self.path is not None and any(Path(self.path).iterdir()):
            self.kept = True
            weakref.finalize(model, shutil.rmtree, self.path, ignore_errors=True)

"""Named tensors in the run directory, as safetensors: no pickle is ever read."""

from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import safe_open

from pipeline.stages.storage import Storage


def write_tensors(storage: Storage, name: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write float32 tensors, sorted by name so that equal tensors give equal bytes."""
    ordered = {key: tensors[key].detach().to("cpu", torch.float32).contiguous() for key in sorted(tensors)}
    storage.write_bytes(name, safetensors.torch.save(ordered, dict(sorted(metadata.items()))))


def read_tensors(storage: Storage, name: str) -> dict[str, torch.Tensor]:
    """All tensors of a file."""
    if storage.local:
        return safetensors.torch.load_file(storage.path(name))
    return safetensors.torch.load(storage.read_bytes(name))


def read_metadata(storage: Storage, name: str) -> dict[str, str]:
    """The metadata of a file; empty where the file is absent."""
    if not storage.exists(name):
        return {}
    if storage.local:
        with safe_open(storage.path(name), "pt") as file:
            return file.metadata() or {}
    content = storage.read_bytes(name)
    import json

    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]).get("__metadata__", {})

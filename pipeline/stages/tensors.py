"""Named tensors in the run directory, as safetensors: no pickle is ever read."""

import json
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import safe_open

from pipeline.stages.storage import Storage


def write_tensors(storage: Storage, name: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write float32 tensors, sorted by name so that equal tensors give equal bytes."""
    ordered = {key: tensors[key].detach().to("cpu", torch.float32).contiguous() for key in sorted(tensors)}
    storage.write_bytes(name, _with_sorted_header(safetensors.torch.save(ordered, metadata)))


def _with_sorted_header(content: bytes) -> bytes:
    """The same file with the header's keys in order: the library writes metadata in an order that changes per call."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    ordered += b" " * (-len(ordered) % 8)  # offsets count from the header's end, which is aligned
    return len(ordered).to_bytes(8, "little") + ordered + content[8 + size :]


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
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]).get("__metadata__", {})

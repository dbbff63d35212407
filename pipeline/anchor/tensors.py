"""Named tensors in the run directory, as safetensors: no pickle is ever read."""

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage


def write_tensors(
    storage: Storage,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    metadata: dict[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write tensors in ``dtype``, sorted by name so that equal tensors give equal bytes.

    Raises RunFailed for NaN and infinity, naming the tensor.
    """
    ordered = {key: tensors[key].detach().to("cpu", dtype).contiguous() for key in sorted(tensors)}
    for key, tensor in ordered.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RunFailed(f"NaN or infinity in {key} while making {name}: check the model or its dtype")
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
    """The metadata of a file; empty where the file is absent. Raises SafetensorError or ValueError for a damaged one."""
    if not storage.exists(name):
        return {}
    if storage.local:
        with safe_open(storage.path(name), "pt") as file:
            return file.metadata() or {}
    with storage.fs.open_input_file(storage.path(name)) as file:
        whole = file.size()
        size = int.from_bytes(file.read_at(8, 0), "little")
        header = json.loads(file.read_at(min(size, whole), 8))
    data = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    if whole != 8 + size + data:
        raise ValueError(f"{name}: {whole} bytes, its header says {8 + size + data}")
    return header.get("__metadata__", {})


def carried(fingerprint: str, counts: dict[str, Any]) -> dict[str, str]:
    """Metadata of a file that is found again by `counts_of`."""
    return {"fingerprint": fingerprint, "counts": json.dumps(counts, sort_keys=True)}


def fingerprint_of(storage: Storage, name: str) -> str | None:
    """The fingerprint that a complete file carries; None where it is absent or damaged."""
    try:
        return read_metadata(storage, name).get("fingerprint")
    except (SafetensorError, ValueError):  # cut off or overwritten: not what this program leaves under a final name
        return None


def counts_of(storage: Storage, name: str, fingerprint: str) -> dict[str, Any] | None:
    """The counts that a complete file was written with; None where it has to be written (again)."""
    if fingerprint_of(storage, name) != fingerprint:
        return None
    counts = read_metadata(storage, name).get("counts")
    return None if counts is None else json.loads(counts)

"""Named tensors in the run directory, as safetensors: no pickle is ever read.

Files are written tensor by tensor, or by some rows of a tensor at a time, so that a writer needs no memory for a whole
one; see tensor_file.py for reading by rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.node_copy import node_copy
from alphatoken.pipeline.run.storage import Storage

Shapes = Mapping[str, tuple[int, ...]]  # by the tensors' names
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.float16: "F16"}


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
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    with tensor_stream(storage, name, shapes, metadata, dtype) as stream:
        for key in sorted(tensors):
            stream.put(key, tensors[key].detach().to("cpu", dtype).contiguous())


class TensorStream:
    """Takes the rows of every tensor in the order of names and rows; made by ``tensor_stream``."""

    def __init__(self, stream: Any, name: str, shapes: Shapes, dtype: torch.dtype) -> None:
        self._stream, self._name, self._dtype = stream, name, dtype
        self._left = [(key, math.prod(shapes[key])) for key in sorted(shapes, reverse=True)]  # the next one is the last

    def put(self, key: str, rows: torch.Tensor | np.ndarray) -> None:
        """Add a whole tensor of the stream's dtype on the host, or the next of its rows. Raises RunFailed for NaN and
        infinity."""
        while self._left and not self._left[-1][1]:
            self._left.pop()
        due, left = self._left.pop() if self._left else ("nothing", 0)
        count = math.prod(rows.shape)
        if not count:
            self._left.append((due, left))
            return
        assert due == key and count <= left and rows.itemsize == self._dtype.itemsize, (self._name, key, due, left)
        if isinstance(rows, np.ndarray):  # which may be a view of Ray's store, and torch warns of those
            finite, content = bool(np.isfinite(rows).all()), rows.reshape(-1).view(np.uint8)
        else:
            finite, content = bool(torch.isfinite(rows).all()), rows.reshape(-1).view(torch.uint8).numpy()
        if not finite:
            raise RunFailed(f"NaN or infinity in {key} while making {self._name}: check the model or its dtype")
        self._left.append((due, left - count))
        self._stream.write(content.data)

    def finish(self) -> None:
        """Everything must have come."""
        assert not any(left for _, left in self._left), (self._name, self._left[-3:])


@contextmanager
def tensor_stream(
    storage: Storage, name: str, shapes: Shapes, metadata: dict[str, str], dtype: torch.dtype = torch.float32
) -> Iterator[TensorStream]:
    """Write a file of tensors of these shapes bit by bit; it appears under its name when the ``with`` block ends."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for key in sorted(shapes):  # of one dtype: the order in which the library writes them as well
        size = math.prod(shapes[key]) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shapes[key]), "data_offsets": [at, at + size]}
        at += size
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)  # offsets count from the header's end, which is aligned
    with storage.open_writer(name) as file:
        file.write(len(content).to_bytes(8, "little") + content)
        stream = TensorStream(file, name, shapes, dtype)
        yield stream
        stream.finish()


def read_tensors(storage: Storage, name: str) -> dict[str, torch.Tensor]:
    """All tensors of a file, from a local disk as pages of it that are read when they are needed, until written to."""
    if storage.local:
        return safetensors.torch.load_file(storage.path(name))
    return safetensors.torch.load(storage.read_bytes(name))


def mapped_tensors(storage: Storage, name: str) -> dict[str, torch.Tensor]:
    """All tensors of a file that several workers of a node read, as pages of one file that they share.

    From an object store it comes to the node once, into the user's cache. Raises OSError where that is full.
    """
    return safetensors.torch.load_file(storage.path(name) if storage.local else node_copy(storage, name))


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

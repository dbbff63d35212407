"""Fingerprints: what a stage depends on, and whether it is still the same."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from alphatoken.pipeline.run.redaction import redacted
from alphatoken.pipeline.run.remote import MODEL_FILES, is_remote, model_files
from alphatoken.pipeline.run.seen import seen_of_file

ADAPTER = "adapter_config.json"


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def of_file(path: str | Path) -> str:
    """sha256 of a local file's content; read once per process while its size and times stay the same."""
    status = os.stat(path)
    return _of_content(str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@cache
def _of_content(path: str, *version: int) -> str:
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def of_model(path: str, tokenizer_only: bool = False) -> str:
    """Fingerprint of a model directory by content, of one behind a URI by what its store says of size and time of the
    files, or of a hub id by its name (its revision is a setting).

    ``tokenizer_only`` leaves the weights and the model's configuration out: what `prepare` depends on.
    """
    directory = Path(path)
    if is_remote(path):
        remote = model_files(path)
        return digest({name: remote[name].version for name in remote if not tokenizer_only or _of_tokenizer(name)})
    if not directory.is_dir():
        return f"hub:{path}"
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.suffix in MODEL_FILES)
    found = {p.name: of_file(p) for p in files if not tokenizer_only or _of_tokenizer(p.name)}
    adapter = directory / ADAPTER
    if adapter.is_file():  # of the base that it is put upon as well
        base = str(json.loads(adapter.read_text()).get("base_model_name_or_path"))
        found["base model"] = of_model(base, tokenizer_only)
    return digest(found)


def seen_of_model(path: str) -> str:
    """The model's place, and of a local directory size and time of its newest file, for people."""
    directory = Path(path)
    files = [p.stat() for p in directory.iterdir() if p.suffix in MODEL_FILES] if directory.is_dir() else []
    if not files:
        return redacted(path)
    return f"{path} ({seen_of_file(sum(f.st_size for f in files), max(f.st_mtime for f in files))})"


def of_policy(checkpoints: Sequence[str]) -> str | list[str]:
    """Fingerprint of model.policy: of its model, or of every checkpoint in their order where there are several."""
    found = [of_model(path) for path in checkpoints]
    return found[0] if len(found) == 1 else found


def _of_tokenizer(name: str) -> bool:
    return "token" in name or name.endswith((".model", ".jinja")) or name in _VOCABULARY


_VOCABULARY = {"vocab.json", "merges.txt", "vocab.txt"}


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves in which two JSON values differ, as (dotted key, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if old == new else [(prefix, old, new)]

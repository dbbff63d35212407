"""Fingerprints: what a stage depends on, and whether it is still the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

MODEL_FILES = (".safetensors", ".json", ".bin", ".gguf", ".model", ".jinja", ".txt")


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def of_file(path: str | Path) -> str:
    """sha256 of a local file's content."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def of_model(path: str, tokenizer_only: bool = False) -> str:
    """Fingerprint of a model directory by content, or of a hub id by its name (its revision is a setting).

    ``tokenizer_only`` leaves the weights and the model's configuration out: what `prepare` depends on.
    """
    directory = Path(path)
    if not directory.is_dir():
        return f"hub:{path}"
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.suffix in MODEL_FILES)
    if tokenizer_only:
        files = [p for p in files if "token" in p.name or p.suffix in (".model", ".jinja") or p.name in _VOCABULARY]
    return digest({p.name: of_file(p) for p in files})


_VOCABULARY = {"vocab.json", "merges.txt", "vocab.txt"}


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves in which two JSON values differ, as (dotted key, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if old == new else [(prefix, old, new)]

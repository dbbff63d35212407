"""Where a model comes from, its configuration and its tokenizer: a local directory, a hub id, or a PEFT adapter.

Without torch until one of them is read: importing it takes seconds, which a worker that is given its tokenizer saves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ADAPTER = "adapter_config.json"


class UnreadableModel(ValueError):
    """A model or tokenizer cannot be loaded; the message names the place and the remedy."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from and how it is loaded."""

    path: str
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    def arguments(self) -> dict[str, Any]:
        """What every ``from_pretrained`` is given beside the path."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def adapter_base(path: str) -> str | None:
    """The base model of a PEFT adapter directory; None where ``path`` is not one."""
    file = Path(path) / ADAPTER
    return json.loads(file.read_text())["base_model_name_or_path"] if file.is_file() else None


def load_config(source: ModelSource) -> Any:
    """The model's configuration, without its weights. Raises UnreadableModel."""
    path = adapter_base(source.path) or source.path
    return reading(path, lambda: transformers.AutoConfig.from_pretrained(path, **source.arguments()))


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UnreadableModel."""
    base = adapter_base(source.path)
    own = base is None or (Path(source.path) / "tokenizer_config.json").is_file()
    path = source.path if own else str(base)
    return reading(path, lambda: transformers.AutoTokenizer.from_pretrained(path, **source.arguments()), "a tokenizer")


def portable(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> PreTrainedTokenizerBase | ModelSource:
    """What a worker is given to have ``tokenizer``: itself where its class is of transformers and its work is done by
    `tokenizers`, since it can then be sent (1.5 MB for 50,000 tokens) and spares the worker the import of torch; else
    ``source``, where code of its own lies.
    """
    own = type(tokenizer).__module__.partition(".")[0] == "transformers"
    return tokenizer if own and isinstance(tokenizer, PreTrainedTokenizerFast) else source


def reading(path: str, read: Callable[[], Any], what: str = "a model") -> Any:
    """What ``read`` returns. Raises UnreadableModel, naming ``path``, for the many ways in which it may fail."""
    try:
        return read()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, UnpicklingError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:3]) if lines[0].endswith(":") else lines[0]
        if "trust_remote_code" in str(error):
            reason += "; model.trust_remote_code=true lets it run code of its own"
        raise UnreadableModel(f"{path} cannot be read as {what}: {reason}") from error

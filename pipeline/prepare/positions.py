"""How many positions a model has of its own: a learned or fixed table ends, and a longer row finds no entry in it.

Rotary positions are computed for any length; there the configuration's number says only what the model was trained on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alphatoken.pipeline.maths.model_source import ModelSource, load_config
from alphatoken.pipeline.maths.models import auto_class
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.remote import here

_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def own_positions(source: ModelSource, wanted: int) -> int | None:
    """Tokens that a row of this model may have, where its table of positions ends before ``wanted`` tokens; else None.

    From the configuration alone: the model is built without storage for its weights, and only where the configuration
    names a smaller number. Raises SettingsWrong for a model that cannot be built so.
    """
    config = load_config(here(source, weights=False))
    text = config.get_text_config()
    named = {n for name in _NAMES if isinstance(n := getattr(text, name, None), int) and 0 < n < wanted}
    if not named:
        return None
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # code of models raises anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SettingsWrong(
            [
                f"model.policy: {source.path} names {min(named)} positions, and whether they end there cannot be told "
                f"({reason}): set data.max_length={min(named)}"
            ]
        ) from error
    return min(named & _tables(model), default=None)


def _tables(model: nn.Module) -> set[int]:
    """Positions that a table of the model could hold; also those of tables of other things."""
    words: Any = model.get_input_embeddings()  # type: ignore[operator]  # an nn.Module to mypy
    found = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not words:
            before = getattr(module, "offset", 0)  # OPT: entries that stand for no position
            found.add(module.num_embeddings - (before if isinstance(before, int) else 0))
    for name, buffer in model.named_buffers():  # GPT-J: angles of rotary positions, in a table nevertheless
        if "pos" in name.rpartition(".")[2] and buffer.dim() == 2:
            found.add(buffer.shape[0])
    return found

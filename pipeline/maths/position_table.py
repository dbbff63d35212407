"""How many positions a model has of its own: a learned or fixed table ends, and a longer row finds no entry in it.

Rotary positions are computed for any length; there the configuration's number says only what the model was trained on.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def named_positions(config: Any, wanted: int) -> set[int]:
    """Numbers of positions below ``wanted`` that a configuration names, whatever they mean."""
    text = config.get_text_config()
    return {n for name in _NAMES if isinstance(n := getattr(text, name, None), int) and 0 < n < wanted}


def positions_of(model: Any, wanted: int) -> int | None:
    """Tokens that a row of this model may have, where its table of positions ends before ``wanted`` tokens; else None."""
    named = named_positions(model.config, wanted)
    return min(named & _tables(model), default=None) if named else None


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

"""Flags on a message that say whether it is to be learned, and on a row whether its answer is a good one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alphatoken.pipeline.prepare.columns import shown, value_of, wrong_type
from alphatoken.pipeline.prepare.outcome import Unusable

# On messages: OpenAI and ShareGPT's `weight`, axolotl's `train` and `training`, ms-swift's `loss`.
TURN_FLAGS = ("weight", "train", "training", "loss")
_DETAILS = ("train_detail", "training_detail")  # axolotl: by characters
_ROW_FLAGS = ("label", "kto_tag")  # of KTO: TRL's and LLaMA-Factory's


def learned(message: Mapping[str, Any], where: str) -> bool | None:
    """Whether a message is to be learned; None where it does not say.

    ``where`` names it in the reasons of `Unusable`, which is raised for other values than 0, 1, false and true, and for
    flags that contradict each other.
    """
    if len(message) == ("role" in message) + ("content" in message):  # nearly every message of nearly every data set
        return None
    given = {name: message[name] for name in TURN_FLAGS if message.get(name) is not None}
    for name in _DETAILS:
        if message.get(name):
            raise Unusable(
                f"turn_flag: {where}.{name} marks parts of a message, which is not read: use train or weight"
            )
    for name, value in given.items():
        if not isinstance(value, int | float):
            raise wrong_type(f"{where}.{name}", value, "0 or 1" if name == "weight" else "true or false")
        if value not in (0, 1):
            raise Unusable(
                f"turn_flag: {where}.{name}={shown(value)} is neither 0 nor 1: a turn is learned or it is not"
            )
    said = {bool(value) for value in given.values()}
    if len(said) > 1:
        flags = " and ".join(f"{name}={shown(value)}" for name, value in given.items())
        raise Unusable(f"contradictory_flags: {where} has {flags}")
    return said.pop() if said else None


def without_flags(message: dict[str, Any]) -> dict[str, Any]:
    """The message as the template is given it: what is to be learned is no part of what is said."""
    return {name: value for name, value in message.items() if name not in TURN_FLAGS}


def refuse_bad_answer(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, ...]:
    """Raise `Unusable` where the row's label says that its answer is a bad one; returns notes.

    A label is true or false. Numbers count only where the user named the column: they may be those of any classes.
    """
    if not any((columns.get(name) or name) in row for name in _ROW_FLAGS):
        return ()
    said = {}
    for name in _ROW_FLAGS:
        value = value_of(row, name, columns)
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            value = value.strip().lower() == "true"
        if isinstance(value, bool):
            said[columns.get(name) or name] = value
        elif value is not None and columns.get(name):
            if isinstance(value, str) or not isinstance(value, int | float) or value not in (0, 1):
                raise Unusable(f"wrong_type: {columns[name]} is {shown(value)}, not true or false")
            said[columns[name]] = bool(value)
    if len(set(said.values())) > 1:
        raise Unusable(f"contradictory_flags: the row has {' and '.join(f'{n}={v}' for n, v in said.items())}")
    if False in said.values():
        raise Unusable(
            f"bad_answer: {next(iter(said))} is false: a bad answer (KTO) is not learned; with a good one to the same "
            "prompt it makes a pair (prompt, chosen, rejected)"
        )
    unread = not said and any(value_of(row, name, columns) in (0, 1) for name in _ROW_FLAGS)
    return ("label_not_read",) if unread else ()

"""One raw row becomes one Pair: two supervised Examples that share a prompt.

A pair is recognised in the shapes that are in use, and each of its branches is written as a supervised row. So the
chat template, the labels and the refusals of supervised data hold for pairs as well. A row without a prompt column
holds the prompt as what both branches begin with: whole messages, or the text up to the last whitespace.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from alphatoken.data_schemas import BRANCHES
from alphatoken.pipeline.prepare.outcome import IGNORED
from alphatoken.pipeline.prepare.rows import Unusable, earlier_turns, is_sharegpt, messages
from alphatoken.pipeline.prepare.tokenize import Example, ExampleMaker

TOKEN_COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt.

    ``chosen``, ``rejected``: prompt and response as one sequence each. The texts are the row's own where it holds
    plain strings, else what the tokens say: up to the first response token, and from there to the last one. ``notes``: what
    happened to the row, to be counted (keys of `NOTES`).
    """

    prompt_text: str
    chosen_text: str
    rejected_text: str
    chosen: Example
    rejected: Example
    notes: tuple[str, ...] = ()

    @property
    def truncated(self) -> bool:
        """Whether tokens of either branch were cut from the right."""
        return self.chosen.truncated or self.rejected.truncated


def is_pair(row: Any, columns: Mapping[str, str]) -> bool:
    """Whether a row has the columns of a preference pair, and one of them at least has a value."""
    names = [columns.get(branch) or branch for branch in BRANCHES]
    return isinstance(row, Mapping) and any(
        all(name in row for name in both) and any(row[name] not in (None, "") for name in both)
        for both in (names, TOKEN_COLUMNS)
    )


class PairMaker:
    """Makes Pairs from raw rows with one tokenizer; arguments as `ExampleMaker`, and it raises the same."""

    def __init__(
        self, tokenizer: Any, max_length: int, chat: str, columns: Mapping[str, str], vocab_size: int,
        positions: int | None = None,
    ) -> None:  # fmt: skip
        inner = {name: name for name in ("system", "id") if name == "system" or columns.get(name)}
        self._make = ExampleMaker(tokenizer, max_length, chat, inner, vocab_size, positions)
        self._tokenizer, self._chat, self._columns = tokenizer, chat, dict(columns)

    def __call__(self, row: Mapping[str, Any], source: str) -> Pair:
        """The Pair of one row. Raises `Unusable` with ``identical_branches``, ``empty_branch``, or what is wrong else."""
        try:
            rows = branch_rows(row, self._columns)
        except RecursionError:
            raise Unusable("too_deep: values nested too deeply to be read") from None
        chosen, rejected = (self._branch(name, rows[name], source) for name in BRANCHES)
        if chosen.input_ids == rejected.input_ids:
            length = len(chosen.input_ids)
            cut = f" once they are cut to {length} tokens (data.max_length, or the model's positions)"
            cut = cut if chosen.truncated or rejected.truncated else ""
            raise Unusable(f"identical_branches: chosen and rejected are the same tokens{cut}")
        texts = [self._text(rows[name]) for name in BRANCHES]
        prompt = rows["chosen"].get("prompt")
        notes = tuple(dict.fromkeys((*chosen.notes, *rejected.notes)))
        if "history" in rows["chosen"]:  # in which no turn is a response of either branch
            notes = tuple(note for note in notes if note != "turns_not_learned")
        if isinstance(prompt, str) and None not in texts and self._chat != "always":
            return Pair(prompt, str(texts[0]), str(texts[1]), chosen, rejected, notes)
        before = self._said(chosen.input_ids[: _response(chosen).start])
        said = {name: self._said(e.input_ids[_response(e)]) for name, e in (("chosen", chosen), ("rejected", rejected))}
        return Pair(before, said["chosen"], said["rejected"], chosen, rejected, notes)

    def _branch(self, name: str, row: dict[str, Any], source: str) -> Example:
        try:
            return self._make(row, source)
        except Unusable as problem:
            code, _, text = str(problem).partition(": ")
            if code == "empty_response":
                raise Unusable(f"empty_branch: {name} is blank") from None
            raise Unusable(f"{code}: {name}: {text}") from None

    def _text(self, row: Mapping[str, Any]) -> str | None:
        completion = row.get("completion")
        return completion if isinstance(completion, str) else None

    def _said(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _response(example: Example) -> slice:
    """From the first response token through the last; an Example has one at least."""
    inside = [i for i, label in enumerate(example.labels) if label != IGNORED]
    return slice(inside[0], inside[-1] + 1)


def branch_rows(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """``chosen`` and ``rejected`` as supervised rows in the usual names.

    ``columns``: canonical name -> the user's. Raises `Unusable` for a row that is no pair.
    """
    if not isinstance(row, Mapping):
        raise Unusable(f"wrong_type: the row is {type(row).__name__}, not an object with columns")
    if not is_pair(row, columns):
        raise Unusable("not_a_pair: the row has no chosen and rejected (data.columns names them)")
    same = {"id": _value(row, "id", columns)}
    if all(row.get(name) is not None for name in TOKEN_COLUMNS):
        own = ("input_ids", "labels", "attention_mask", "position_ids")
        return {b: {**same, **{name: row.get(f"{b}_{name}") for name in own}} for b in BRANCHES}
    sides = {branch: _side(_value(row, branch, columns), branch) for branch in BRANCHES}
    tools = _value(row, "tools", columns)
    same |= {"tools": tools} if tools is not None else {}
    prompt = _value(row, "prompt", columns)
    turns, instruction = _value(row, "conversations", columns), _value(row, "instruction", columns)
    by_format = prompt is None and (turns is not None or instruction is not None)
    if by_format or columns.get("system"):
        same |= {"system": _value(row, "system", columns)}
    if prompt is None and turns is not None:
        prompt = messages(turns, "conversations", sharegpt=True)
    elif prompt is None and instruction is not None and all(isinstance(side, str) for side in sides.values()):
        asked = {"instruction": instruction, "input": _value(row, "input", columns)}
        if earlier := earlier_turns(row, columns):
            asked["history"] = [{**turn, "weight": 0} for turn in earlier]
        return {branch: {**same, **asked, "output": side} for branch, side in sides.items()}
    prompt, rest = _split(prompt, sides)
    return {branch: {**same, "prompt": prompt, "completion": said} for branch, said in rest.items()}


def _value(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> Any:
    return row.get(columns.get(name) or name)


def _side(value: Any, branch: str) -> str | list[dict[str, Any]]:
    """A branch as text, or as messages with roles (from one message or several, in either naming)."""
    if value is None or value == "" or value == [] or (isinstance(value, str) and not value.strip()):
        raise Unusable(f"empty_branch: {branch} is {'null' if value is None else 'blank'}")
    if isinstance(value, str):
        return value
    turns = [value] if isinstance(value, Mapping) else value
    try:
        return messages(turns, branch, sharegpt=is_sharegpt(turns))
    except Unusable as problem:
        if problem.code == "empty_response":
            raise Unusable(f"empty_branch: {str(problem).partition(': ')[2]}") from None
        raise


def _split(prompt: Any, sides: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The prompt, and what each branch adds to it."""
    chosen, rejected = (sides[branch] for branch in BRANCHES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return (prompt, dict(sides)) if prompt is not None else _split_text(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        said = {b: [{"role": "assistant", "content": s}] if isinstance(s, str) else s for b, s in sides.items()}
        return _split(prompt, said)
    if prompt is not None and not isinstance(prompt, str):
        prompt = messages(prompt, "prompt", sharegpt=is_sharegpt(prompt))
    if prompt is not None and all(side[0]["role"] == "assistant" for side in (chosen, rejected)):
        return prompt, dict(sides)
    if isinstance(prompt, list):
        if all(side[: len(prompt)] == prompt for side in (chosen, rejected)):
            return prompt, _rest({branch: side[len(prompt) :] for branch, side in sides.items()})
        if prompt[-1]["role"] == "assistant":
            return prompt, dict(sides)
        raise Unusable("prompt_mismatch: chosen and rejected neither go on from the prompt nor begin with it")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if prompt is not None and all(turn.get("content") != prompt for turn in chosen[:shared]):
        raise Unusable("prompt_mismatch: chosen and rejected neither go on from the prompt nor begin with it")
    if not shared:
        raise Unusable("no_prompt: there is no prompt, and chosen and rejected begin with different messages")
    return chosen[:shared], _rest({branch: side[shared:] for branch, side in sides.items()})


def _split_text(chosen: str, rejected: str) -> tuple[str, dict[str, Any]]:
    shared = len(commonprefix([chosen, rejected]))
    if chosen == rejected:
        raise Unusable("identical_branches: chosen and rejected are the same")
    while shared and not chosen[shared - 1].isspace():  # a word is not cut in two
        shared -= 1
    if shared and chosen[shared - 1] == " ":  # nor a space cut off the word that it leads
        shared -= 1
    if not chosen[:shared].strip():
        raise Unusable("no_prompt: there is no prompt, and chosen and rejected begin with different words")
    return chosen[:shared], _rest({"chosen": chosen[shared:], "rejected": rejected[shared:]})


def _rest(sides: dict[str, Any]) -> dict[str, Any]:
    """What the branches add; raises where it is nothing."""
    nothing = [branch for branch, side in sides.items() if not side]
    if len(nothing) == len(sides):
        raise Unusable("identical_branches: chosen and rejected are the same")
    if nothing:
        raise Unusable(f"empty_branch: {nothing[0]} adds nothing to what both begin with")
    return sides

"""What a raw row holds: the shapes of supervised data that are recognised, and what they mean.

A row (a dict as a file reader yields it) becomes one of three things: a conversation for the tokenizer's chat
template, a plain prompt with its completion, or token ids that somebody else made. A row that cannot be used
raises `Unusable` with the reason that the quarantine table will show; a configuration that cannot work raises
`TemplateRequired`.

Columns that are present but null count as absent: this is how Arrow represents rows of different shapes.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alphatoken.pipeline.prepare.columns import (
    PREFERENCE,
    SHAPES,
    columns_of,
    filled,
    row_kind,
    shown,
    value_of,
    wrong_type,
)
from alphatoken.pipeline.prepare.continuation import continued
from alphatoken.pipeline.prepare.flags import learned, refuse_bad_answer, without_flags
from alphatoken.pipeline.prepare.outcome import (
    ROLES,
    Conversation,
    Plain,
    Pretokenized,
    TemplateRequired,
    Unusable,
)
from alphatoken.pipeline.prepare.pretokenized import read_tokens

CHAT_CHOICES = ("auto", "always", "never")
_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_ALPACA_INPUT = ", paired with an input that provides further context"
_ALPACA_TURN = {"user": "\n\n### Instruction:\n{}", "assistant": "\n\n### Response:\n{}"}


def needs_template(kind: str, row: Mapping[str, Any], columns: Mapping[str, str], chat: str) -> bool:
    """Whether rows like ``row``, of that ``kind`` (see `row_kind`), are usable only with a chat template."""
    if kind in ("messages", "sharegpt"):
        return True
    if kind in ("prompt_completion", "preference"):
        names = ("prompt", "completion") if kind == "prompt_completion" else ("prompt", "chosen", "rejected")
        lists = any(isinstance(value_of(row, name, columns), list) for name in names)
        turns = kind == "preference" and value_of(row, "conversations", columns) is not None
        return lists or turns or chat == "always"
    return kind == "instruction" and chat == "always"


def require_template(
    kind: str, row: Mapping[str, Any], columns: Mapping[str, str], chat: str, has_template: bool
) -> None:
    """Raise `TemplateRequired` when ``row`` needs a chat template and has none, or chat=never forbids it.

    Made for a driver that looks at the first row before any work starts.
    """
    if not needs_template(kind, row, columns, chat):
        return
    if not has_template:
        raise TemplateRequired(
            f"the rows ({kind}) need a chat template (data.chat_template={chat}), but the tokenizer of "
            "model.policy has none: take a chat model, or plain prompt and completion strings with "
            "data.chat_template=auto"
        )
    if chat == "never":
        raise TemplateRequired(
            f"the rows ({kind}) are messages, which only the chat template of model.policy's tokenizer can "
            "turn into text, but data.chat_template=never: set data.chat_template=auto, or give plain strings"
        )


def parse_row(
    row: Mapping[str, Any], columns: Mapping[str, str], chat: str, has_template: bool
) -> Conversation | Plain | Pretokenized:
    """Recognise one supervised row.

    ``chat`` is data.chat_template; ``has_template``: whether the tokenizer has one. Raises `Unusable` for a
    malformed row and `TemplateRequired` for a configuration that cannot work. A preference pair is not a
    supervised row, unless it also has the columns of one (which are then read).
    """
    present = [name for name, value in row.items() if value is not None]
    kind = shape_of(row, columns)
    if kind in PREFERENCE:
        pair = {
            c for shape, names in SHAPES if shape in PREFERENCE for name in names for c in columns_of(name, columns)
        }
        kind = row_kind([name for name in present if name not in pair], columns)
        if kind == "unknown":
            raise Unusable("preference_row: a chosen/rejected pair where supervised data is expected (data.format)")
    if kind == "unknown":
        raise Unusable(
            f"unknown_columns: {shown(sorted(map(str, present)))} is none of messages, instruction+output, "
            "prompt+completion|response, conversations, input_ids+labels|completion_mask|assistant_masks|loss_mask "
            "(data.columns names them)"
        )
    require_template(kind, row, columns, chat, has_template)
    templated = has_template and chat != "never"
    try:
        if kind == "pretokenized":
            return read_tokens(row, columns)
        notes = refuse_bad_answer(row, columns)
        parsed = _parsed(row, kind, columns, chat, templated)
        return replace(parsed, notes=(*parsed.notes, *notes)) if notes else parsed
    except RecursionError:
        raise Unusable("too_deep: values nested too deeply to be read") from None


def _parsed(
    row: Mapping[str, Any], kind: str, columns: Mapping[str, str], chat: str, templated: bool
) -> Conversation | Plain:
    if kind == "instruction":
        return _instruction(row, columns, templated)
    if kind == "prompt_completion":
        return _prompt_completion(row, columns, chat)
    name = "messages" if kind == "messages" else "conversations"
    turns = messages(value_of(row, name, columns), name, sharegpt=kind == "sharegpt")
    return _conversation(row, columns, turns, first=0, system_by_format=kind == "sharegpt")


def shape_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The shape of one row, see `row_kind`, from the columns that have a value."""
    kind = row_kind(filled(row), columns)
    # A row that would be of a shape but for blank texts is one of that shape, with a better reason than its columns.
    return kind if kind != "unknown" else row_kind([name for name, value in row.items() if value is not None], columns)


def _text(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> str:
    value = value_of(row, name, columns)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise wrong_type(name, value, "a string")
    return value


def _decoded(value: Any, where: str) -> Any:
    """A column that holds a list, or the JSON text of one (how tables without nested types store it)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise Unusable(f"wrong_type: {where} is a string that is not JSON: {shown(value)}") from None


def _without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """Null keys of a message say nothing. Those inside tool arguments and schemas do, and are not looked at."""
    return {key: item for key, item in value.items() if item is not None}


def _instruction(row: Mapping[str, Any], columns: Mapping[str, str], templated: bool) -> Conversation | Plain:
    instruction, context = _text(row, "instruction", columns), _text(row, "input", columns)
    output, system = _text(row, "output", columns), _text(row, "system", columns)
    if not output.strip():
        raise Unusable("empty_response: output is blank")
    earlier = earlier_turns(row, columns)
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    if templated:
        return _conversation(row, columns, [*earlier, _said("user", question), _said("assistant", output)], 0, True)
    # The wording of Stanford Alpaca; a system text takes the place of its opening sentence. As one text has one
    # response, earlier turns belong to the prompt.
    opening = system or _ALPACA.format(_ALPACA_INPUT if context.strip() else "")
    before = "".join(_ALPACA_TURN[turn["role"]].format(turn["content"]) for turn in earlier)
    middle = f"\n\n### Input:\n{context}" if context.strip() else ""
    return Plain(f"{opening}{before}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:\n", output)


def earlier_turns(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The turns before an instruction: pairs of a question and its answer, or messages."""
    value = _decoded(value_of(row, "history", columns) or None, "history")
    if not value:
        return []
    if not isinstance(value, list):
        raise wrong_type("history", value, "a list of questions with their answers")
    if isinstance(value[0], Mapping):
        turns = messages(value, "history", sharegpt=is_sharegpt(value))
    else:
        said = []
        for index, both in enumerate(value):
            if not isinstance(both, list) or len(both) != 2:
                raise Unusable(f"wrong_type: history[{index}] is not a question with its answer: {shown(both)}")
            said += [_said(role, text) for role, text in zip(("user", "assistant"), both, strict=True)]
        turns = messages(said, "history")
    for turn in turns:
        if turn["role"] not in _ALPACA_TURN or "content" not in turn:
            raise Unusable(f"wrong_type: history has a message of role {turn['role']} or without text")
    return turns


def _prompt_completion(row: Mapping[str, Any], columns: Mapping[str, str], chat: str) -> Conversation | Plain:
    prompt, completion = value_of(row, "prompt", columns), value_of(row, "completion", columns)
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str | list):
            raise wrong_type(name, value, "a string or a list of messages")
    if isinstance(completion, str) and not completion.strip():
        raise Unusable("empty_response: completion is blank")
    if isinstance(prompt, str) and isinstance(completion, str) and chat != "always":
        if columns.get("system") and _text(row, "system", columns):
            raise Unusable("system_without_template: plain text has no place for a system text (data.chat_template)")
        return Plain(prompt, completion)
    asked = [_said("user", prompt)] if isinstance(prompt, str) else messages(prompt, "prompt")
    said = [_said("assistant", completion)] if isinstance(completion, str) else messages(completion, "completion")
    asked, said, begun = continued(asked, said)
    found = _conversation(row, columns, asked + said, first=len(asked), system_by_format=False)
    # The first response may be another turn, where the one that is continued is not to be learned.
    return replace(found, begun=begun if found.respond[0] == len(found.messages) - len(said) else 0)


def _conversation(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    turns: list[dict[str, Any]],
    first: int,
    system_by_format: bool,
) -> Conversation:
    """Add the system and tools columns; assistant turns from index ``first`` on are responses.

    A `system` column belongs to the instruction and ShareGPT formats; elsewhere it counts only when the user
    named it in data.columns, because it might be anything. A leading system message goes before the column.
    """
    system = _text(row, "system", columns) if system_by_format or columns.get("system") else ""
    if system and turns[0]["role"] not in ("system", "developer"):
        turns, first = [_said("system", system), *turns], first + 1
    said = [learned(turn, turn["role"]) for turn in turns]
    answers = [i for i, turn in enumerate(turns) if i >= first and turn["role"] == "assistant"]
    respond = tuple(i for i in answers if said[i] is not False)
    if not answers:
        raise Unusable("no_response: no assistant message")
    if not respond:
        raise Unusable("no_response: every assistant message is marked as not to be learned (weight, train, loss)")
    notes: tuple[str, ...] = ("turns_not_learned",) if len(respond) < len(answers) else ()
    if any(flag and turn["role"] != "assistant" for flag, turn in zip(said, turns, strict=True)):
        notes += ("flag_not_read",)
    # An empty string is how a text column says that there are no tools.
    tools = _decoded(value_of(row, "tools", columns) or None, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise wrong_type("tools", tools, "a list of tool descriptions")
    return Conversation([without_flags(turn) for turn in turns], tools or None, respond, notes)


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def messages(value: Any, where: str, sharegpt: bool = False) -> list[dict[str, Any]]:
    """Checked messages with ``role`` and ``content``, from such a list, a ShareGPT one, or the JSON text of either.

    ``where`` names the column in the reasons of `Unusable`.
    """
    value = _decoded(value, where)
    if not isinstance(value, list):
        raise wrong_type(where, value, "a list of messages")
    if not value:
        raise Unusable(f"no_response: {where} is empty")
    return [_message(_renamed(m, f"{where}[{i}]") if sharegpt else m, f"{where}[{i}]") for i, m in enumerate(value)]


def _renamed(message: Any, where: str) -> Any:
    """A ShareGPT message in the names of `messages`; a function call's JSON becomes ``tool_calls``."""
    if not isinstance(message, Mapping):
        return message
    said = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
    role = said.get("role", message.get("from"))
    said["content"] = said.get("content", message.get("value"))
    said["role"] = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role == "function_call":
        calls = _decoded(said.pop("content"), where)
        calls = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
            raise Unusable(f"wrong_type: {where} is a function_call without a name")
        said["tool_calls"] = [{"type": "function", "function": dict(call)} for call in calls]
    return said


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise wrong_type(where, message, "a message")
    role = message.get("role")
    if role is None:
        raise Unusable(f"missing_role: {where} has no role")
    if not isinstance(role, str):
        raise wrong_type(f"{where}.role", role, "a string")
    if role not in ROLES:
        raise Unusable(f"unknown_role: {where} has role {shown(role)}, not one of {', '.join(ROLES)}")
    result = {
        "role": role,
        **_without_nulls({k: v for k, v in message.items() if k not in ("role", "content")}),
    }
    calls = _decoded(result.pop("tool_calls", None) or None, f"{where}.tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise wrong_type(f"{where}.tool_calls", calls, "a list of calls")
    if calls:
        result["tool_calls"] = [_call(call) for call in calls]
    learned(result, where)  # refused here, where the message has a name
    content = _content(message.get("content"), where)
    if role == "assistant" and not calls and not (content or "").strip():
        raise Unusable(f"empty_response: {where} is blank")
    if content is None and not (role == "assistant" and calls):
        raise wrong_type(f"{where}.content", None, "text")
    if content is not None:
        result["content"] = content
    return result


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call without the keys that say nothing; its arguments as they are."""
    said = _without_nulls(call)
    if isinstance(said.get("function"), Mapping):
        said["function"] = _without_nulls(said["function"])
    return said


def is_sharegpt(turns: Any) -> bool:
    """Whether messages are named as in ShareGPT, ``from`` and ``value``."""
    return isinstance(turns, list) and any(
        isinstance(turn, Mapping) and turn.get("role") is None and turn.get("from") is not None for turn in turns
    )


def _content(content: Any, where: str) -> str | None:
    """A message's text: a string, or the parts of a list put together; None where there is none."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_type(f"{where}.content", content, "a string or a list of text parts")
    for part in content:
        if not isinstance(part, Mapping):
            raise wrong_type(f"a part of {where}.content", part, "a part with type text")
        if part.get("type") != "text":
            raise Unusable(f"not_text: {where}.content has a part of type {shown(part.get('type'))}")
        if not isinstance(part.get("text"), str):
            raise wrong_type(f"the text of a part of {where}.content", part.get("text"), "a string")
    return "".join(part["text"] for part in content)

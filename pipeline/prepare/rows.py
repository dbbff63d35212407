"""What a raw row holds: the shapes of supervised data that are recognised, and what they mean.

A row (a dict as a file reader yields it) becomes one of three things: a conversation for the tokenizer's chat
template, a plain prompt with its completion, or token ids that somebody else made. A row that cannot be used
raises `Unusable` with the reason that the quarantine table will show; a configuration that cannot work raises
`TemplateRequired`.

Columns that are present but null count as absent: this is how Arrow represents rows of different shapes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from alphatoken.pipeline.prepare.continuation import continued

CHAT_CHOICES = ("auto", "always", "never")
ROLES = ("user", "assistant", "system", "tool", "developer")

# In the order in which a row that fits several shapes is read. Token ids come first because whoever added
# them meant them to be used; a preference pair often carries a `messages` copy of its chosen side.
_SHAPES = (
    ("pretokenized", ("input_ids", "labels")),
    ("preference_tokens", ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")),
    ("preference", ("chosen", "rejected")),
    ("messages", ("messages",)),
    ("prompt_completion", ("prompt", "completion")),
    ("instruction", ("instruction", "output")),
    ("sharegpt", ("conversations",)),
)
PREFERENCE = ("preference", "preference_tokens")
_OTHER_NAMES = {"completion": ("completion", "response")}
_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_ALPACA_INPUT = ", paired with an input that provides further context"


class Unusable(ValueError):
    """A row that cannot be used: ``code: what is wrong``, one line, safe to store as UTF-8.

    Takes one argument so that it survives pickling on its way through Ray.
    """

    def __init__(self, reason: str) -> None:
        line = " ".join(str(reason).encode("utf-8", "backslashreplace").decode().split())
        super().__init__(line if len(line) <= 400 else line[:397] + "...")

    @property
    def code(self) -> str:
        """The stable first word of the reason, e.g. ``no_response``: what counts are grouped by."""
        return str(self).partition(":")[0]


class TemplateRequired(ValueError):
    """The data need a chat template and the configuration gives none: wrong for every row, not for one."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the chat template.

    ``messages``: dicts with ``role`` (one of ROLES) and ``content`` (a string; absent only beside
    ``tool_calls``); other keys are kept for the template. ``tools``: JSON schemas or None. ``respond``: the
    indices of the assistant messages that are responses, ascending. ``begun``: characters of the first response's
    content that are the prompt's, where a completion continues an unfinished message.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    respond: tuple[int, ...]
    begun: int = 0


@dataclass(frozen=True, slots=True)
class Plain:
    """Text taken as it is: ``completion`` (not blank) directly follows ``prompt`` (may be empty)."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Pretokenized:
    """Token ids from elsewhere: two lists of int, not yet checked against each other or a vocabulary."""

    input_ids: list[int]
    labels: list[int]


def row_kind(column_names: Iterable[str], columns: Mapping[str, str]) -> str:
    """The shape that the column names promise.

    One of messages, prompt_completion, instruction, sharegpt, pretokenized, preference, preference_tokens, unknown.
    ``columns`` maps a canonical name to the user's; where several shapes fit, one whose columns the user named wins.
    """
    present = set(column_names)
    fitting = [
        (kind, names)
        for kind, names in _SHAPES
        if all(any(column in present for column in _columns_of(name, columns)) for name in names)
    ]
    for kind, names in fitting:
        if any(columns.get(name) for name in names):
            return kind
    return fitting[0][0] if fitting else "unknown"


def needs_template(kind: str, row: Mapping[str, Any], columns: Mapping[str, str], chat: str) -> bool:
    """Whether rows like ``row``, of that ``kind`` (see `row_kind`), are usable only with a chat template."""
    if kind in ("messages", "sharegpt"):
        return True
    if kind in ("prompt_completion", "preference"):
        names = ("prompt", "completion") if kind == "prompt_completion" else ("prompt", "chosen", "rejected")
        lists = any(isinstance(_value(row, name, columns), list) for name in names)
        turns = kind == "preference" and _value(row, "conversations", columns) is not None
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
    kind = row_kind(present, columns)
    if kind in PREFERENCE:
        pair = {
            c for shape, names in _SHAPES if shape in PREFERENCE for name in names for c in _columns_of(name, columns)
        }
        kind = row_kind([name for name in present if name not in pair], columns)
        if kind == "unknown":
            raise Unusable("preference_row: a chosen/rejected pair where supervised data is expected (data.format)")
    if kind == "unknown":
        raise Unusable(
            f"unknown_columns: {_shown(sorted(map(str, present)))} is none of messages, instruction+output, "
            "prompt+completion|response, conversations, input_ids+labels (data.columns names them)"
        )
    require_template(kind, row, columns, chat, has_template)
    templated = has_template and chat != "never"
    try:
        if kind == "pretokenized":
            return Pretokenized(_integers(row, "input_ids", columns), _integers(row, "labels", columns))
        if kind == "instruction":
            return _instruction(row, columns, templated)
        if kind == "prompt_completion":
            return _prompt_completion(row, columns, chat)
        name = "messages" if kind == "messages" else "conversations"
        turns = messages(_value(row, name, columns), name, sharegpt=kind == "sharegpt")
        return _conversation(row, columns, turns, first=0, system_by_format=kind == "sharegpt")
    except RecursionError:
        raise Unusable("too_deep: values nested too deeply to be read") from None


def _columns_of(name: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    given = columns.get(name)
    return (given,) if given else _OTHER_NAMES.get(name, (name,))


def _value(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> Any:
    return next((row[column] for column in _columns_of(name, columns) if row.get(column) is not None), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _wrong(where: str, value: Any, wanted: str) -> Unusable:
    kind = "null" if value is None else type(value).__name__
    return Unusable(f"wrong_type: {where} is {kind}, not {wanted}")


def _text(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> str:
    value = _value(row, name, columns)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _wrong(name, value, "a string")
    return value


def _integers(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> list[int]:
    values = _value(row, name, columns)
    if not isinstance(values, list):
        raise _wrong(name, values, "a list of integers")
    for index, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong(f"{name}[{index}]", value, "an integer")
    return values


def _decoded(value: Any, where: str) -> Any:
    """A column that holds a list, or the JSON text of one (how tables without nested types store it)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise Unusable(f"wrong_type: {where} is a string that is not JSON: {_shown(value)}") from None


def _without_nulls(value: Any) -> Any:
    """Drop null entries of dicts: Arrow gives every struct of a column the union of all keys."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _instruction(row: Mapping[str, Any], columns: Mapping[str, str], templated: bool) -> Conversation | Plain:
    instruction, context = _text(row, "instruction", columns), _text(row, "input", columns)
    output, system = _text(row, "output", columns), _text(row, "system", columns)
    if not output.strip():
        raise Unusable("empty_response: output is blank")
    if templated:
        question = f"{instruction}\n\n{context}" if context.strip() else instruction
        return _conversation(row, columns, [_said("user", question), _said("assistant", output)], 0, True)
    # The wording of Stanford Alpaca; a system text takes the place of its opening sentence.
    opening = system or _ALPACA.format(_ALPACA_INPUT if context.strip() else "")
    middle = f"\n\n### Input:\n{context}" if context.strip() else ""
    return Plain(f"{opening}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:\n", output)


def _prompt_completion(row: Mapping[str, Any], columns: Mapping[str, str], chat: str) -> Conversation | Plain:
    prompt, completion = _value(row, "prompt", columns), _value(row, "completion", columns)
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str | list):
            raise _wrong(name, value, "a string or a list of messages")
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
    return replace(found, begun=begun)


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
    respond = tuple(i for i, turn in enumerate(turns) if i >= first and turn["role"] == "assistant")
    if not respond:
        raise Unusable("no_response: no assistant message")
    # An empty string is how a text column says that there are no tools.
    tools = _decoded(_value(row, "tools", columns) or None, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise _wrong("tools", tools, "a list of tool descriptions")
    return Conversation(turns, _without_nulls(tools) or None, respond)


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def messages(value: Any, where: str, sharegpt: bool = False) -> list[dict[str, Any]]:
    """Checked messages with ``role`` and ``content``, from such a list, a ShareGPT one, or the JSON text of either.

    ``where`` names the column in the reasons of `Unusable`.
    """
    value = _decoded(value, where)
    if not isinstance(value, list):
        raise _wrong(where, value, "a list of messages")
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
        raise _wrong(where, message, "a message")
    role = message.get("role")
    if role is None:
        raise Unusable(f"missing_role: {where} has no role")
    if not isinstance(role, str):
        raise _wrong(f"{where}.role", role, "a string")
    if role not in ROLES:
        raise Unusable(f"unknown_role: {where} has role {_shown(role)}, not one of {', '.join(ROLES)}")
    result = {
        "role": role,
        **_without_nulls({k: v for k, v in message.items() if k not in ("role", "content")}),
    }
    calls = _decoded(result.pop("tool_calls", None) or None, f"{where}.tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise _wrong(f"{where}.tool_calls", calls, "a list of calls")
    if calls:
        result["tool_calls"] = calls
    content = _content(message.get("content"), where)
    if role == "assistant" and not calls and not (content or "").strip():
        raise Unusable(f"empty_response: {where} is blank")
    if content is None and not (role == "assistant" and calls):
        raise _wrong(f"{where}.content", None, "text")
    if content is not None:
        result["content"] = content
    return result


def _content(content: Any, where: str) -> str | None:
    """A message's text: a string, or the parts of a list put together; None where there is none."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(f"{where}.content", content, "a string or a list of text parts")
    for part in content:
        if not isinstance(part, Mapping):
            raise _wrong(f"a part of {where}.content", part, "a part with type text")
        if part.get("type") != "text":
            raise Unusable(f"not_text: {where}.content has a part of type {_shown(part.get('type'))}")
        if not isinstance(part.get("text"), str):
            raise _wrong(f"the text of a part of {where}.content", part.get("text"), "a string")
    return "".join(part["text"] for part in content)

"""What a tokenizer's chat template reads, and the text that it makes of messages.

Templates differ in the form that they take: a message's text as a string or as a list of parts, the arguments of a call
as an object or as JSON text. The form is tried out once per template, on messages of our own, and rows are put into it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from alphatoken.pipeline.prepare.outcome import Unusable

Span = tuple[int, int]
Messages = list[dict[str, Any]]

REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a message
_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
THOUGHT_ENDS = tuple(end for _, end in _THOUGHTS)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates write today's date. The same inputs must give the same tokens tomorrow, so their clock stands
# still at the date that Llama's own template falls back to. (A function cannot be handed to a template.)
_CLOCK = "".join(f" | replace('%{code}', '{datetime(2024, 7, 26).strftime('%' + code)}')" for code in "aAbBdHIjmMpSyY")
_STOPPED_CLOCK = f"{{%- macro strftime_now(format) -%}}{{{{ format | replace('%-', '%'){_CLOCK} }}}}{{%- endmacro -%}}"
_PROBE = "qzProbez"
_CALL_ID = "call00000"  # nine letters and digits, which some templates insist on


def stand_in_call(arguments: Any = None) -> dict[str, Any]:
    """A tool call that says nothing."""
    return {"id": _CALL_ID, "type": "function", "function": {"name": "f", "arguments": arguments or {"a": "b"}}}


STAND_IN_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


class ChatTemplate:
    """One chat template of one tokenizer.

    ``source``: the Jinja text. ``specials``: the texts of special tokens. ``thoughts``: matches the tags of reasoning that
    the template knows, None where it knows none. ``marked``: it has generation markers.
    """

    def __init__(self, tokenizer: Any, source: str, specials: Sequence[str]) -> None:
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.source = _STOPPED_CLOCK + source if "strftime_now" in source else source
        self.specials = tuple(specials)
        self.marked = bool(_GENERATION.search(source))
        tags = [tag for pair in _THOUGHTS if any(tag in source for tag in pair) for tag in pair]
        self.thoughts = re.compile(f"({'|'.join(map(re.escape, tags))})") if tags else None
        self._parts: dict[str, bool] = {}
        self._arguments_as_text: bool | None = None

    def mentions(self, name: str) -> bool:
        """Whether the template's source has the word; one that does not cannot read a key of that name."""
        return name in self.source

    def text(self, messages: Messages, tools: Any = None, prompt: bool = False) -> str:
        """The text of ``messages`` (not empty), with the generation prompt where ``prompt``. Raises `Unusable`."""
        return self._text(self._formed(messages), tools, prompt)

    def text_and_marks(self, messages: Messages, tools: Any = None) -> tuple[str, list[Span]]:
        """The text, and the character ranges of its generation markers (none without them)."""
        if not self.marked:
            return self.text(messages, tools), []
        text, marks = self._rendered(self._formed(messages), tools, return_assistant_tokens_mask=True)
        return text, [(start, end) for start, end in marks if start < end]

    def _text(self, formed: Messages, tools: Any = None, prompt: bool = False) -> str:
        return self._rendered(formed, tools, add_generation_prompt=prompt)[0]

    def _rendered(self, formed: Messages, tools: Any, **options: Any) -> tuple[str, list[Span]]:
        """The text, and its generation markers where they are asked for.

        This is what the tokenizer's own apply_chat_template calls, without what that looks at anew for every row.
        """
        messages = [{k: v for k, v in m.items() if v is not None} for m in formed]
        try:
            made: Any = render_jinja_template([messages], tools, chat_template=self.source, **options, **self._special)
        except ImportError:
            raise
        except Exception as problem:  # templates raise anything, on purpose and by accident; it is reported
            raise _refused(problem) from problem
        texts, marks = made
        return valid(texts[0], "the text"), marks[0] if marks else []

    def _formed(self, messages: Messages) -> Messages:
        """The messages as this template reads them."""
        return [self._as_read(message) for message in messages]

    def _as_read(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if len(message) == 2 and isinstance(content, str):  # nearly every message of nearly every data set
            return {**message, "content": _as_parts(content)} if self._reads_parts(message["role"]) else message
        changed: dict[str, Any] = {}
        thought = next((message[key] for key in REASONING if message.get(key) is not None), None)
        if thought is not None:  # under whatever name the template knows it
            changed = {"thinking": message.get("thinking", thought), "reasoning_content": thought}
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [self._call(call) for call in calls]
        if isinstance(content, str) and self._reads_parts(message["role"]):
            changed["content"] = _as_parts(content)
        return {**message, **changed} if changed else message

    def _call(self, call: Any) -> Any:
        """A call whose arguments are an object where they are one, or JSON text where the template takes only that."""
        inner = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping):
            return _with_arguments(call, self._wants_text()) if isinstance(call, Mapping) else call
        return {**call, "function": _with_arguments(inner, self._wants_text())}

    def _reads_parts(self, role: str) -> bool:
        """Whether messages of a role are read as a list of parts, and not as a string."""
        if role not in self._parts:
            self._parts[role] = False
            self._parts[role] = not self._shows(role, False) and self._shows(role, True)
        return self._parts[role]

    def _shows(self, role: str, parts: bool) -> bool:
        asked = {"role": "user", "content": "q"}
        if role != "user" and self._reads_parts("user"):
            asked["content"] = _as_parts("q")  # type: ignore[assignment]
        said: dict[str, Any] = {"role": role, "content": _as_parts(_PROBE) if parts else _PROBE}
        around: dict[str, Messages] = {
            "user": [said], "assistant": [asked, said],
            "tool": [asked, {"role": "assistant", "tool_calls": [stand_in_call()]}, {**said, "tool_call_id": _CALL_ID}],
        }  # fmt: skip
        try:
            return _stands(self._text(around.get(role, [said, asked])))
        except Unusable:
            return False

    def _wants_text(self) -> bool:
        """Whether arguments of calls have to be JSON text: an object makes the template fail or is written as Python."""
        if self._arguments_as_text is None:
            self._arguments_as_text = False  # also while it is being tried out
            self._arguments_as_text = not self._takes({"a": _PROBE}) and self._takes(json.dumps({"a": _PROBE}))
        return self._arguments_as_text

    def _takes(self, arguments: Any) -> bool:
        asked = {"role": "user", "content": _as_parts("q") if self._reads_parts("user") else "q"}
        called = {"role": "assistant", "content": "", "tool_calls": [stand_in_call(arguments)]}
        try:
            text = self._text([asked, called], [STAND_IN_TOOL])
        except Unusable:
            return False
        return _stands(text)


def _stands(text: str) -> bool:
    """Whether the probe was written, and not as part of a Python value."""
    return _PROBE in text and f"'{_PROBE}'" not in text


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _with_arguments(call: Mapping[str, Any], as_text: bool) -> Mapping[str, Any]:
    given = call.get("arguments")
    if as_text:
        changed = isinstance(given, Mapping | list)
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)} if changed else call
    if not isinstance(given, str):
        return call
    try:
        read = json.loads(given)
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": read} if isinstance(read, dict) else call


def _refused(problem: Exception) -> Unusable:
    if isinstance(problem, Unusable):
        return problem
    return Unusable(f"template_error: {type(problem).__name__}: {problem}")


def valid(text: str, what: str) -> str:
    """The text itself; raises `Unusable` where it is not Unicode, which neither tokenizers nor Arrow take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise Unusable(f"bad_unicode: {what} has a lone surrogate at character {problem.start}") from problem
    return text

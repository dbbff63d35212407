"""One raw row becomes one supervised Example: token ids, and labels on exactly the tokens of the responses.

Text is tokenized once, as a whole, with character offsets. The responses are found as character ranges of the
rendered text, and a token that covers any character of a response belongs to it. Nothing is ever searched for
by the response's wording. Where the ranges come from:

- a template with generation markers (``{% generation %}``) says so itself;
- otherwise the text is rendered again up to each response: it begins where the rendering of what precedes it,
  with the generation prompt, ends, and stops where the rendering that includes it ends;
- a template that renders a turn differently once others follow (Qwen3 removes past reasoning) ends a response
  at its EOS token, which must be the only one before the next message's own text.

A response includes its end-of-turn token; template whitespace after that is not part of it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from os.path import commonprefix
from typing import Any

from alphatoken.pipeline.prepare.rows import CHAT_CHOICES, Conversation, Plain, Pretokenized, Unusable, parse_row

IGNORED = -100
Span = tuple[int, int]

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_UNSTABLE = "template_not_prefix_stable: the chat template {}; add {{% generation %}} markers to it"
# Some templates write today's date. The same inputs must give the same tokens tomorrow, so their clock stands
# still at the date that Llama's own template falls back to. (A function cannot be handed to a template.)
_CLOCK = "".join(f" | replace('%{code}', '{datetime(2024, 7, 26).strftime('%' + code)}')" for code in "aAbBdHIjmMpSyY")
_STOPPED_CLOCK = f"{{%- macro strftime_now(format) -%}}{{{{ format | replace('%-', '%'){_CLOCK} }}}}{{%- endmacro -%}}"


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized supervised example.

    ``labels[i]`` is ``input_ids[i]`` where token ``i`` belongs to a response, else -100; both have one
    length, at most max_length. ``labels[0]`` is always -100, because nothing predicts the first token.
    ``truncated``: tokens were cut from the right. ``notes``: what happened to the row, to be counted (keys of `NOTES`).
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    source: str
    truncated: bool
    notes: tuple[str, ...] = ()


class ExampleMaker:
    """Makes Examples from raw rows with one tokenizer.

    ``max_length``: tokens kept of an example. ``chat``: data.chat_template. ``columns``: canonical name to
    the user's column name. ``vocab_size``: rows of the model's embedding; larger ids are refused. Raises
    ValueError when the tokenizer or an argument cannot work.
    """

    def __init__(self, tokenizer: Any, max_length: int, chat: str, columns: Mapping[str, str], vocab_size: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets: model.policy needs a "
                "fast one (a tokenizer.json, as AutoTokenizer.from_pretrained(...).save_pretrained writes it)"
            )
        if chat not in CHAT_CHOICES:
            raise ValueError(f"data.chat_template={chat!r} is none of {', '.join(CHAT_CHOICES)}")
        if max_length < 2:
            raise ValueError(f"data.max_length={max_length}: a response needs a token before it, so at least 2")
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._chat = chat
        self._columns = dict(columns)
        self._vocab_size = vocab_size
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = frozenset(added | set(tokenizer.all_special_ids))
        self._opening = self._tokens_put_first()

    def __call__(self, row: Mapping[str, Any], source: str) -> Example:
        """The Example of one row. ``source`` names the row in reports, and is its id where it has none.

        Raises `Unusable` for a row that cannot be used, `TemplateRequired` where the configuration cannot
        work, and ValueError for a plain completion when the tokenizer has no EOS token.
        """
        if not isinstance(row, Mapping):
            raise Unusable(f"wrong_type: the row is {type(row).__name__}, not an object with columns")
        template = self._tokenizer.chat_template
        has_template = "default" in template if isinstance(template, dict) else bool(template)
        parsed = parse_row(row, self._columns, self._chat, has_template)
        if isinstance(parsed, Conversation):
            chat = _Chat(self._tokenizer, parsed)
            ids, labels = chat.ids, chat.labels(self._special)
        elif isinstance(parsed, Plain):
            ids, labels = self._plain(parsed)
        else:
            ids, labels = self._pretokenized(parsed)
        labels[:1] = [IGNORED] * len(ids[:1])
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < self._vocab_size:
                where = f"input_ids[{ids.index(token)}]={token}"
                raise Unusable(f"outside_vocabulary: {where}, the model has {self._vocab_size} tokens")
        first = next((index for index, label in enumerate(labels) if label != IGNORED), None)
        if first is None:
            raise Unusable("no_response: no token after the first belongs to a response")
        limit = self._max_length
        if first >= limit:
            raise Unusable(f"no_response: truncated away, it begins at token {first} and data.max_length={limit}")
        return Example(self._id(row, source), ids[:limit], labels[:limit], source, len(ids) > limit, parsed.notes)

    def _id(self, row: Mapping[str, Any], source: str) -> str:
        named = self._columns.get("id")
        value = row.get(named or "id")
        if value is None or value == "":
            return source
        if isinstance(value, str | int) and not isinstance(value, bool):
            return _valid(str(value), "id")
        if named:
            raise Unusable(f"wrong_type: id is {type(value).__name__}, not a string or an integer")
        return source  # a column `id` that nobody asked for may hold anything

    def _tokens_put_first(self) -> list[int]:
        """The ids that the tokenizer itself puts before a text (BOS, for those that add it)."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self._tokenizer("a")["input_ids"]
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        return list(full[: starts[0]]) if starts else []

    def _pretokenized(self, row: Pretokenized) -> tuple[list[int], list[int]]:
        if len(row.input_ids) != len(row.labels):
            raise Unusable(f"lengths_differ: {len(row.input_ids)} input_ids and {len(row.labels)} labels")
        for index, (token, label) in enumerate(zip(row.input_ids, row.labels, strict=True)):
            if label not in (IGNORED, token):
                raise Unusable(f"label_mismatch: labels[{index}]={label}, neither -100 nor input_ids={token}")
        return list(row.input_ids), list(row.labels)

    def _plain(self, row: Plain) -> tuple[list[int], list[int]]:
        """Prompt and completion as one text; BOS where the tokenizer adds it, EOS at the end, each once."""
        if self._eos is None:
            raise ValueError("model.policy's tokenizer has no EOS token to end a completion with: set eos_token")
        text = row.prompt + row.completion
        ids, offsets = _encoded(self._tokenizer, text)
        labels = _labels(ids, offsets, [(len(row.prompt), len(text))])
        ids, labels = self._opening + ids, [IGNORED] * len(self._opening) + labels
        while self._bos is not None and ids[:2] == [self._bos] * 2:  # the text may begin with it as well
            del ids[0], labels[0]
        while ids[-2:] == [self._eos] * 2:
            del ids[-1], labels[-1]
        if ids[-1:] != [self._eos]:
            ids.append(self._eos)
            labels.append(self._eos)
        return ids, labels


class _Chat:
    """One conversation rendered and tokenized: ``text``, ``ids`` and their character ``offsets``."""

    def __init__(self, tokenizer: Any, row: Conversation) -> None:
        self._tokenizer, self._row = tokenizer, row
        self._template = self._checked_template()
        self.text = self._render(row.messages)
        self.ids, self._offsets = _encoded(tokenizer, self.text)

    def labels(self, special: frozenset[int]) -> list[int]:
        """Labels of the responses; ``special``: ids of which the last in a response is its end of turn."""
        marked = _MARKER.search(self._template)
        spans = self._marked() if marked else [self._span(i) for i in self._row.respond]
        return _labels(self.ids, self._offsets, [self._trimmed(span, special) for span in spans])

    def _checked_template(self) -> str:
        try:
            template = str(self._tokenizer.get_chat_template(tools=self._row.tools))
        except ValueError as problem:
            raise Unusable(f"template_error: {problem}") from problem
        called = any("tool_calls" in message for message in self._row.messages)
        for name, given in (("tool_calls", called), ("tools", self._row.tools)):
            # A template that does not know them leaves them out without a word.
            if given and name not in template:
                raise Unusable(f"tools_not_in_template: the row has {name}, the chat template does not")
        return _STOPPED_CLOCK + template if "strftime_now" in template else template

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=self._row.tools, chat_template=self._template, **options
            )
        except ImportError:
            raise
        except Exception as problem:  # templates raise anything, on purpose and by accident; it is reported
            raise Unusable(f"template_error: {type(problem).__name__}: {problem}") from problem

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """The template's text for ``messages`` (not empty). ``prompt``: with the generation prompt."""
        return _valid(self._apply(messages, add_generation_prompt=prompt, tokenize=False), "the text")

    def _marked(self) -> list[Span]:
        """Response ranges by the template's generation markers.

        Assistant turns of a prompt are marked too; they lie before the first response and are cut off there.
        """
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        marks = self._apply(self._row.messages, **options)["assistant_masks"]
        begin, before = 0, self._row.messages[: self._row.respond[0]]
        if any(message["role"] == "assistant" for message in before):
            rendered = self._render(before)
            if not self.text.startswith(rendered):
                raise Unusable(_UNSTABLE.format("renders the prompt differently once a response follows"))
            begin = len(rendered)
        # Turns that are marked as not to be learned are marked by the template all the same.
        respond, left_out = self._row.respond, []
        for i in range(respond[0], len(self._row.messages)):
            if self._row.messages[i]["role"] == "assistant" and i not in respond:
                left_out.append(self._span(i))
        spans = []
        for marked, run in groupby(zip(marks, self._offsets, strict=True), key=lambda pair: pair[0]):
            covered = [offset for _, offset in run]
            if marked and covered[-1][1] > begin and not any(s <= covered[0][0] < e for s, e in left_out):
                spans.append((max(begin, covered[0][0]), covered[-1][1]))
        return spans

    def _span(self, i: int) -> Span:
        """The characters of response ``i``, by rendering what comes before it and then it as well."""
        start, messages = self._start(i), self._row.messages
        if i + 1 == len(messages):
            return start, len(self.text)
        through = self._render(messages[: i + 1])
        if self.text.startswith(through) and len(through) > start:
            return start, len(through)
        # The turn is rendered differently now that others follow. Its EOS lies between its start and the next
        # message's own text; where there is more than one, any choice would be a guess.
        limit = len(commonprefix([self.text, *self._probes(i + 1)]))
        ends = self._ends((start, limit), frozenset([self._tokenizer.eos_token_id]))
        if len(ends) != 1:
            what = f"renders message {i} differently once others follow, {len(ends)} EOS tokens in it"
            raise Unusable(_UNSTABLE.format(what))
        return start, ends[0]

    def _start(self, i: int) -> int:
        """Where response ``i`` begins: after the generation prompt.

        A generation prompt may say more than the template writes before a finished turn (an opened <think>).
        Then the response begins where the two part, whatever the response says. Where the messages before are
        rendered differently by now, it begins where that prompt ends just ahead of what changes with it.
        A conversation that opens with a response has no generation prompt: it begins after what the template
        writes before any.
        """
        if i == 0:
            return len(commonprefix([self.text, *self._probes(i)]))
        messages = self._row.messages
        prompt = self._render(messages[:i], prompt=True)
        if self.text.startswith(prompt):
            return len(prompt)
        before, probes = self._render(messages[:i]), self._probes(i)
        common = commonprefix([prompt, *probes])
        if self.text.startswith(before) and common.startswith(before) and self.text.startswith(common):
            return len(common)
        # Only messages that follow can have changed those before; after the last one nothing does.
        header, common = prompt[len(before) :], commonprefix(probes)
        opened = header and prompt.startswith(before) and common.endswith(header)
        if opened and self.text.startswith(common) and i + 1 < len(messages):
            return len(common)
        what = f"renders what comes before message {i} differently once it follows"
        raise Unusable(_UNSTABLE.format(what))

    def _probes(self, i: int) -> list[str]:
        """The text with message ``i`` saying something else, twice: what they share is not its content."""
        messages, role = self._row.messages, self._row.messages[i]["role"]
        return [self._render([*messages[:i], {"role": role, "content": said}, *messages[i + 1 :]]) for said in "xy"]

    def _ends(self, span: Span, wanted: frozenset[int]) -> list[int]:
        """Where the tokens with ``wanted`` ids end that lie within ``span``."""
        placed = zip(self.ids, self._offsets, strict=True)
        return [e for token, (s, e) in placed if token in wanted and span[0] <= s < e <= span[1]]

    def _trimmed(self, span: Span, special: frozenset[int]) -> Span:
        """The range up to its last special token (end of turn), where only whitespace follows that."""
        ends = self._ends(span, special)
        return (span[0], ends[-1]) if ends and not self.text[ends[-1] : span[1]].strip() else span


def _encoded(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Ids and character offsets of a text, without the special tokens that the tokenizer would add."""
    options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
    try:
        encoded = tokenizer(_valid(text, "the text"), return_offsets_mapping=True, **options)
    except Unusable:
        raise
    except Exception as problem:  # whatever a tokenizer refuses is this row's problem, and reported
        raise Unusable(f"tokenizer_refused: {type(problem).__name__}: {problem}") from problem
    return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]


def _labels(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """The ids of the tokens that cover a character of ``spans``, -100 elsewhere.

    A token without width is a space of which the tokenizer reports only the end: the character before.
    """
    covers = [any(min(start, end - 1) < e and s < end for s, e in spans) for start, end in offsets]
    return [token if covered else IGNORED for token, covered in zip(ids, covers, strict=True)]


def _valid(text: str, what: str) -> str:
    """The text itself; raises `Unusable` where it is not Unicode, which neither tokenizers nor Arrow take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise Unusable(f"bad_unicode: {what} has a lone surrogate at character {problem.start}") from problem
    return text

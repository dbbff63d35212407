"""One raw row becomes one supervised Example: token ids, and labels on exactly the tokens of the responses.

Text is tokenized once, as a whole. The responses are found as character ranges of the rendered text (`responses`), and a
token that covers any character of a response belongs to it: by where its bytes stand (`token_ends`), or by the
tokenizer's offsets. Nothing is ever searched for by the response's wording.

A response includes its end-of-turn token; template whitespace after that is not part of it.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Encoding

from alphatoken.pipeline.prepare.chat import ChatTemplate, Span, valid
from alphatoken.pipeline.prepare.outcome import IGNORED
from alphatoken.pipeline.prepare.responses import Renderer
from alphatoken.pipeline.prepare.rows import CHAT_CHOICES, Conversation, Plain, Pretokenized, Unusable, parse_row
from alphatoken.pipeline.prepare.token_ends import TokenEnds
from alphatoken.pipeline.prepare.windows import Window, window_id, windows

_Tokens = tuple[list[int], list[int]]  # ids and labels
_Encoded = tuple[list[int], Encoding]  # which has the offsets, and looks up single ones much faster than it lists all
_AS_IT_IS = {
    "add_special_tokens": False, "truncation": False, "padding": False, "verbose": False,
    "return_attention_mask": False, "return_token_type_ids": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized supervised example.

    ``labels[i]`` is ``input_ids[i]`` where token ``i`` belongs to a response, else -100; both have one
    length, at most max_length. ``labels[0]`` is always -100, because nothing predicts the first token.
    ``truncated``: tokens were cut from the right. ``notes``: what happened to the row, to be counted (keys of `NOTES`).
    ``lost``: responses whose reasoning the chat template leaves out. ``window``: which one of a longer row's it is, from 1;
    0: the row as a whole. ``left_out``: windows of the row without a response token, told by its first example.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    source: str
    truncated: bool
    notes: tuple[str, ...] = ()
    lost: int = 0
    window: int = 0
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Draft:
    """An Example that is not tokenized yet: ``text`` with the characters of its responses, or ``tokens``, ids and labels."""

    id: str
    source: str
    notes: tuple[str, ...]
    text: str = ""
    spans: tuple[Span, ...] = ()
    lost: int = 0
    tokens: _Tokens | None = None


class ExampleMaker:
    """Makes Examples from raw rows with one tokenizer.

    ``max_length``: tokens kept of an example. ``chat``: data.chat_template. ``columns``: canonical name to
    the user's column name. ``vocab_size``: rows of the model's embedding; larger ids are refused. ``positions``:
    those that the model has, where they end before max_length; no more tokens are kept then. Raises ValueError when the
    tokenizer or an argument cannot work.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, chat: str, columns: Mapping[str, str], vocab_size: int,
        positions: int | None = None,
    ) -> None:  # fmt: skip
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
        self._longest = max_length if positions is None else min(max_length, positions)
        own = f"the model has {positions} positions"
        self._why_longest = f"data.max_length={max_length}" if self._longest == max_length else own
        self._chat = chat
        self._columns = dict(columns)
        self._vocab_size = vocab_size
        self._all_known = max(tokenizer.get_vocab().values(), default=0) < vocab_size
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder
        self._specials = sorted({t.content for t in added.values() if t.special} | set(tokenizer.all_special_tokens))
        # Their offsets take in the blanks beside them, which are other texts.
        self._greedy = frozenset(index for index, token in added.items() if token.lstrip or token.rstrip)
        self._renderers: dict[bool, Renderer] = {}
        self._opening = self._tokens_put_first()
        self._ends = TokenEnds.of(tokenizer)

    def __call__(self, row: Mapping[str, Any], source: str) -> Example:
        """The Example of one row. ``source`` names the row in reports, and is its id where it has none.

        Raises `Unusable` for a row that cannot be used, `TemplateRequired` where the configuration cannot
        work, and ValueError for a plain completion when the tokenizer has no EOS token.
        """
        return usable(self.finished([self._draft(*self._parsed(row, source), source)]))[0]

    @property
    def longest(self) -> int:
        """Tokens that an example has at most."""
        return self._longest

    def split(self, row: Mapping[str, Any], source: str, overlap: int) -> list[Example]:
        """As a call, with one example for each window of a row that is longer than `longest`."""
        return usable(self.finished([self._draft(*self._parsed(row, source), source)], overlap))

    def drafts(self, row: Mapping[str, Any], source: str, turn_by_turn: bool = False) -> list[Draft]:
        """The row as text, for `finished`: one draft. Raises as a call does.

        ``turn_by_turn``: one for each response where the template leaves reasoning out of the whole. Many templates keep
        that of the last turn alone; so each turn is the last of a draft of its own, its message's number after the row's id.
        """
        parsed, name = self._parsed(row, source)
        whole = self._draft(parsed, name, source)
        if not turn_by_turn or not whole.lost or not isinstance(parsed, Conversation) or len(parsed.respond) == 1:
            return [whole]
        found: list[Draft] = []
        for i in parsed.respond:
            begun = parsed.begun if i == parsed.respond[0] else 0
            cut = Conversation(parsed.messages[: i + 1], parsed.tools, (i,), () if found else parsed.notes, begun)
            found.append(self._draft(cut, f"{name}#{i}", source))
        return found

    def finished(self, drafts: Sequence[Draft], overlap: int | None = None) -> list[list[Example] | Unusable]:
        """The Examples of each draft, or why there are none; tokenized together, which costs less.

        One of each; with an ``overlap`` the windows of those that are too long, which are cut else.
        """
        tokenized = iter(self._tokenized([draft for draft in drafts if draft.tokens is None]))
        found: list[list[Example] | Unusable] = []
        for draft in drafts:
            tokens = draft.tokens or next(tokenized)
            try:
                found.append(tokens if isinstance(tokens, Unusable) else self._examples(draft, *tokens, overlap))
            except Unusable as problem:
                found.append(problem)
        return found

    def _tokenized(self, drafts: Sequence[Draft]) -> list[_Tokens | Unusable]:
        """Ids and labels of each text, or why the tokenizer refuses it."""
        found: list[_Tokens | Unusable | None] = [None] * len(drafts)
        if self._ends is not None and (quick := self._ends.ids([draft.text for draft in drafts])) is not None:
            for i, (draft, ids) in enumerate(zip(drafts, quick, strict=True)):
                labels = self._ends.labels(ids, draft.text, draft.spans)
                found[i] = None if labels is None else (ids, labels)
        slow = iter(
            _all_encoded(self._tokenizer, [d.text for d, one in zip(drafts, found, strict=True) if one is None])
        )
        return [self._labelled(d, next(slow)) if one is None else one for d, one in zip(drafts, found, strict=True)]

    def _labelled(self, draft: Draft, encoded: _Encoded | Unusable) -> _Tokens | Unusable:
        return encoded if isinstance(encoded, Unusable) else (encoded[0], self._labels(*encoded, draft))

    def _parsed(self, row: Mapping[str, Any], source: str) -> tuple[Conversation | Plain | Pretokenized, str]:
        """What the row holds, and its id."""
        if not isinstance(row, Mapping):
            raise Unusable(f"wrong_type: the row is {type(row).__name__}, not an object with columns")
        template = self._tokenizer.chat_template
        has_template = "default" in template if isinstance(template, dict) else bool(template)
        return parse_row(row, self._columns, self._chat, has_template), self._id(row, source)

    def _draft(self, parsed: Conversation | Plain | Pretokenized, name: str, source: str) -> Draft:
        if isinstance(parsed, Conversation):
            rendered = self._renderer(bool(parsed.tools))(parsed)
            return Draft(name, source, parsed.notes, rendered.text, tuple(rendered.spans), rendered.lost)
        tokens = self._plain(parsed) if isinstance(parsed, Plain) else self._pretokenized(parsed)
        return Draft(name, source, parsed.notes, tokens=tokens)

    def _examples(self, draft: Draft, ids: list[int], labels: list[int], overlap: int | None) -> list[Example]:
        labels[:1] = [IGNORED] * len(ids[:1])
        if draft.tokens is not None or not self._all_known:
            for token in (min(ids, default=0), max(ids, default=0)):
                if not 0 <= token < self._vocab_size:
                    where = f"input_ids[{ids.index(token)}]={token}"
                    raise Unusable(f"outside_vocabulary: {where}, the model has {self._vocab_size} tokens")
        first = next((index for index, label in enumerate(labels) if label != IGNORED), None)
        if first is None:
            raise Unusable("no_response: no token after the first belongs to a response")
        limit = self._longest
        if overlap is not None and len(ids) > limit:
            return _windows(draft, windows(ids, labels, limit, overlap))
        if first >= limit:
            raise Unusable(f"no_response: truncated away, it begins at token {first} and {self._why_longest}")
        cut = len(ids) > limit
        return [Example(draft.id, ids[:limit], labels[:limit], draft.source, cut, draft.notes, draft.lost)]

    def _renderer(self, tools: bool) -> Renderer:
        """That of the template which is used with or without tools (some tokenizers have two)."""
        if tools not in self._renderers:
            try:
                source = str(self._tokenizer.get_chat_template(tools=[{}] if tools else None))
            except ValueError as problem:
                raise Unusable(f"template_error: {problem}") from problem
            self._renderers[tools] = Renderer(ChatTemplate(self._tokenizer, source, self._specials))
        return self._renderers[tools]

    def _labels(self, ids: list[int], tokenized: Encoding, draft: Draft) -> list[int]:
        """The labels of a draft's tokens."""
        if self._greedy.isdisjoint(ids):
            return _labels(ids, tokenized, draft.spans)
        # Offsets of tokens that take in the blanks beside them are narrowed to the token itself.
        offsets = []
        for token, (start, end) in zip(ids, tokenized.offsets, strict=True):
            if token in self._greedy and (said := draft.text[start:end]).strip():
                start, end = end - len(said.lstrip()), start + len(said.rstrip())
            offsets.append((start, end))
        return _labels_by_offsets(ids, offsets, draft.spans)

    def _id(self, row: Mapping[str, Any], source: str) -> str:
        named = self._columns.get("id")
        value = row.get(named or "id")
        if value is None or value == "":
            return source
        if isinstance(value, str | int) and not isinstance(value, bool):
            return valid(str(value), "id")
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
        ids, tokenized = _encoded(self._tokenizer, text)
        labels = _labels(ids, tokenized, [(len(row.prompt), len(text))])
        ids, labels = self._opening + ids, [IGNORED] * len(self._opening) + labels
        while self._bos is not None and ids[:2] == [self._bos] * 2:  # the text may begin with it as well
            del ids[0], labels[0]
        while ids[-2:] == [self._eos] * 2:
            del ids[-1], labels[-1]
        if ids[-1:] != [self._eos]:
            ids.append(self._eos)
            labels.append(self._eos)
        return ids, labels


def _windows(draft: Draft, found: Sequence[Window]) -> list[Example]:
    """The windows that have a response token, as examples; what is said of the row is told by the first."""
    kept = [one for one in found if any(label != IGNORED for label in one.labels)]
    made = [
        Example(window_id(draft.id, one.number), one.input_ids, one.labels, draft.source, False, window=one.number)
        for one in kept
    ]
    made[0] = replace(made[0], notes=draft.notes, lost=draft.lost, left_out=len(found) - len(kept))
    return made


def usable(found: Sequence[list[Example] | Unusable]) -> list[Example]:
    """The Examples of one row. Raises `Unusable` where it cannot be used.

    Of several turns those that begin after data.max_length are left out, as truncation leaves them out of a whole: the last
    that is left says so.
    """
    kept = [example for examples in found if isinstance(examples, list) for example in examples]
    for problem in found:
        if isinstance(problem, Unusable) and (not kept or problem.code != "no_response"):
            raise problem
    if any(isinstance(problem, Unusable) for problem in found):
        kept[-1] = replace(kept[-1], truncated=True)
    return kept


def _all_encoded(tokenizer: Any, texts: Sequence[str]) -> list[_Encoded | Unusable]:
    """As `_encoded`, of several texts; a reason for each that the tokenizer refuses."""
    if len(texts) > 1:
        try:
            encoded = tokenizer(list(texts), **_AS_IT_IS)
            return list(zip(encoded["input_ids"], encoded.encodings, strict=True))
        except Exception:  # one of them is refused, which one is found below
            pass
    found: list[_Encoded | Unusable] = []
    for text in texts:
        try:
            found.append(_encoded(tokenizer, text))
        except Unusable as problem:
            found.append(problem)
    return found


def _encoded(tokenizer: Any, text: str) -> _Encoded:
    """Ids and the whole encoding of a text, without the special tokens that the tokenizer would add."""
    try:
        encoded = tokenizer(valid(text, "the text"), **_AS_IT_IS)
    except Unusable:
        raise
    except Exception as problem:  # whatever a tokenizer refuses is this row's problem, and reported
        raise Unusable(f"tokenizer_refused: {type(problem).__name__}: {problem}") from problem
    return list(encoded["input_ids"]), encoded.encodings[0]


def _labels(ids: list[int], tokenized: Encoding, spans: Sequence[Span]) -> list[int]:
    """The ids of the tokens that cover a character of ``spans``, -100 elsewhere."""
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        first, past = tokenized.char_to_token(start), tokenized.char_to_token(end)
        if first is None or past is None:  # no token has this character: a blank between tokens, or the end of the text
            return _labels_by_offsets(ids, tokenized.offsets, spans)
        reach = tokenized.token_to_chars(past)
        if reach is not None and reach[0] < end:
            past += 1
        labels[first:past] = ids[first:past]
    return labels


def _labels_by_offsets(ids: list[int], offsets: list[Span], spans: Sequence[Span]) -> list[int]:
    """As `_labels`. A token without width is a space of which the tokenizer reports only the end: the character
    before. ``offsets`` ascend.
    """
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        first, past = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
        while first and offsets[first - 1][1] > start:  # begins before the response and reaches into it
            first -= 1
        while first < past and offsets[first][1] <= start:
            first += 1
        while past < len(offsets) and offsets[past] == (end, end):
            past += 1
        labels[first:past] = ids[first:past]
    return labels

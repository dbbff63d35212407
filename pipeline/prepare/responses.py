"""A conversation as the chat template's text, with the characters of its responses: spans and guard put together.

The text is rendered once. The skeleton that it is compared with depends only on the shape of the conversation where there
are no tools, and is kept; with tools it is one rendering more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alphatoken.pipeline.prepare.chat import REASONING, STAND_IN_TOOL, ChatTemplate, Span, stand_in_call
from alphatoken.pipeline.prepare.guard import NOT_IN_TEMPLATE, check_landed, check_others, check_tools, lost_reasoning
from alphatoken.pipeline.prepare.outcome import Conversation, Unusable
from alphatoken.pipeline.prepare.skeleton import Masked, Piece, Skeleton, free_stem, masked, stand_ins
from alphatoken.pipeline.prepare.spans import Turn, learn, of_marks, placed, trimmed

_SHAPES = 2048  # shapes of conversations that are kept
_ASSISTANT = frozenset(["assistant"])


@dataclass(frozen=True, slots=True)
class Rendered:
    """``text`` with ``spans``, the responses' characters, ascending; ``lost``: responses whose reasoning is left out."""

    text: str
    spans: list[Span]
    lost: int


@dataclass(frozen=True, slots=True)
class _Shape:
    skeleton: Skeleton
    turns: list[Turn]


class Renderer:
    """Renders conversations with one template and finds their responses."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._shapes: dict[str, _Shape | Unusable] = {}
        self._texts: dict[tuple, _Shape] = {}

    def __call__(self, row: Conversation) -> Rendered:
        """Raises `Unusable` for what the template refuses, leaves out, or renders so that no response can be told."""
        self._check_tool_words(row)
        text, marks = self._template.text_and_marks(row.messages, row.tools)
        check_tools(text, row.messages, row.tools)
        key = self._of_texts(row)
        if key in self._texts and (quick := self._known(row, text, marks, self._texts[key])) is not None:
            return quick
        # Marks for whole texts do for nearly every row. Some templates look at the blanks around a text, and some at what
        # a user or a tool says: then that is left as it is.
        for roles, blanks in ((None, False), (None, True), (_ASSISTANT, True)):
            found = self._found(row, text, marks, roles, blanks, None if roles or blanks else key)
            if found is not None:
                return found
        raise Unusable(f"{NOT_IN_TEMPLATE}: the chat template rewrites `assistant` messages")

    def _check_tool_words(self, row: Conversation) -> None:
        called = any("tool_calls" in message for message in row.messages)
        for name, given in (("tool_calls", called), ("tools", row.tools)):
            # A template that does not know them leaves them out without a word.
            if given and not self._template.mentions(name):
                raise Unusable(f"tools_not_in_template: the row has {name}, the chat template does not")

    def _of_texts(self, row: Conversation) -> tuple | None:
        """The shape of a conversation of nothing but texts; None for others."""
        thoughts = self._template.thoughts
        key: list[Any] = [row.respond]
        for message in row.messages:
            role, content = message["role"], message.get("content")
            if len(message) != 2 or not isinstance(content, str):
                return None
            if thoughts is not None and role == "assistant" and thoughts.search(content):
                return None
            key.append(role if content and not content.isspace() else (role, content))
        return None if row.tools or row.begun else tuple(key)

    def _known(self, row: Conversation, text: str, marks: list[Span], shape: _Shape) -> Rendered | None:
        """As `_found`, where the shape is known: nothing is replaced, because the skeleton is there."""
        said = ((i, m["role"], m["content"]) for i, m in enumerate(row.messages))
        pieces = [Piece(i, role, content) for i, role, content in said if content and not content.isspace()]
        places = shape.skeleton.place(text, pieces)
        if places is None:
            return None
        spans, view = dict(zip(shape.skeleton.landed, places, strict=True)), Masked([], pieces, None)
        if self._template.marked:
            return Rendered(text, self._by_marks(row, text, marks, view, spans), 0)
        found = [placed(turn, shape.skeleton, spans, text, self._template.specials, None) for turn in shape.turns]
        return Rendered(text, [span for span in found if span], 0) if None not in found else None

    def _found(
        self, row: Conversation, text: str, marks: list[Span], roles: frozenset[str] | None, blanks: bool,
        key: tuple | None,
    ) -> Rendered | None:  # fmt: skip
        """The responses, by a skeleton in which the texts of ``roles`` (None: of all) are marks; None where it differs.

        ``key``: of `_of_texts`, under which a shape of nothing but texts is kept.
        """
        stem = free_stem([text])
        begun = (row.respond[0], row.begun)
        view = masked(row.messages, stem, self._template.thoughts, begun, roles, blanks)
        try:
            shape = self._shape(row, view, stem) if roles is None else None
            skeleton = self._skeleton(row, view, stem, shape)
        except Unusable as problem:
            if roles is None and problem.code == "template_error":
                return None
            raise
        check_landed(skeleton, view.pieces)
        places = skeleton.place(text, view.pieces)
        if places is None:
            return None
        spans = dict(zip(skeleton.landed, places, strict=True))
        if roles is not None:
            check_others(text, row.messages, spans, view.pieces, self._template.mentions("/no_think"))
        if self._template.marked:
            found = self._by_marks(row, text, marks, view, spans)
        else:
            found = self._by_turns(row, text, view, stem, skeleton, spans, shape)
        if key is not None and shape is not None and len(self._texts) < _SHAPES:
            self._texts[key] = shape
        return Rendered(text, found, lost_reasoning(skeleton, view.pieces, row.respond))

    def _plain(self, row: Conversation) -> bool:
        """Whether nothing but texts differs between this row and others of its shape."""
        return not row.tools and not any(self._own_keys(message) for message in row.messages)

    def _own_keys(self, message: dict[str, Any]) -> list[str]:
        known = ("role", "content", *REASONING)
        return [k for k in message if k not in known and (k == "tool_calls" or self._template.mentions(k))]

    def _shape(self, row: Conversation, view: Masked, stem: str) -> _Shape | None:
        """What is known of conversations of this shape; None where stand-ins for its tools cannot be rendered."""
        keys = sorted({key for message in view.messages for key in self._own_keys(message)} - {"tool_calls"})
        messages = stand_ins(view.messages, keys, stand_in_call())
        tools = [STAND_IN_TOOL] if row.tools else None
        key = repr((messages, tools is None, row.respond, view.opening))
        if key not in self._shapes:
            if len(self._shapes) >= _SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._learned(Masked(messages, view.pieces, view.opening), stem, tools, row.respond)
        shape = self._shapes[key]
        if isinstance(shape, _Shape):
            return shape
        if self._plain(row):
            raise Unusable(str(shape))
        return None

    def _learned(self, view: Masked, stem: str, tools: Any, respond: Sequence[int]) -> _Shape | Unusable:
        try:
            skeleton = Skeleton.of(self._template.text(view.messages, tools), stem)
            check_landed(skeleton, view.pieces)
            turns = [] if self._template.marked else learn(self._template, view, stem, tools, skeleton, respond)
        except Unusable as problem:
            return problem
        return _Shape(skeleton, turns)

    def _skeleton(self, row: Conversation, view: Masked, stem: str, shape: _Shape | None) -> Skeleton:
        if shape is not None and self._plain(row):
            return shape.skeleton
        return Skeleton.of(self._template.text(view.messages, row.tools), stem)

    def _by_turns(
        self, row: Conversation, text: str, view: Masked, stem: str, skeleton: Skeleton, spans: dict[int, Span],
        shape: _Shape | None,
    ) -> list[Span]:  # fmt: skip
        opening = self._opening(row, view, spans)
        for turns in (shape.turns if shape is not None else None, None):
            if turns is None:  # not by the shape: by this row
                turns = learn(self._template, view, stem, row.tools, skeleton, row.respond)
            found = [
                placed(turn, skeleton, spans, text, self._template.specials, opening if k == 0 else None)
                for k, turn in enumerate(turns)
            ]
            if None not in found:
                return [span for span in found if span is not None]
        raise Unusable("template_not_prefix_stable: what stands around a response depends on what the row says")

    def _by_marks(
        self, row: Conversation, text: str, marks: list[Span], view: Masked, spans: dict[int, Span]
    ) -> list[Span]:
        """The responses by the template's generation markers; those of other assistant turns are not."""
        pieces = dict(enumerate(view.pieces))
        opening = self._opening(row, view, spans)
        found = []
        for message, (start, end) in of_marks(marks, pieces, spans, [m["role"] for m in row.messages]):
            if message not in row.respond:
                continue
            if message == row.respond[0] and opening is not None:
                start = max(start, opening)
            said = [e for n, (_, e) in spans.items() if pieces[n].message == message and e <= end]
            if start < end:
                found.append((start, trimmed(text, max([start, *said]), end, self._template.specials)))
        for number, (start, end) in spans.items():
            piece = pieces[number]
            before = opening is not None and piece.message == row.respond[0] and end <= opening
            if piece.message in row.respond and not piece.reasoning and not before:
                _check_marked(piece, (start, end), found)
        return found

    @staticmethod
    def _opening(row: Conversation, view: Masked, spans: dict[int, Span]) -> int | None:
        """Where the response begins that continues a message of the prompt; None where there is none."""
        if not row.begun:
            return None
        if view.opening is None or view.opening[0] not in spans:
            raise Unusable("continuation_unclear: the prompt's last message and its continuation meet in no text")
        return spans[view.opening[0]][view.opening[1]]


def _check_marked(piece: Piece, place: Span, marks: Sequence[Span]) -> None:
    if not any(start < place[1] and place[0] < end for start, end in marks):
        raise Unusable(
            f"{NOT_IN_TEMPLATE}: the generation markers of the chat template leave out `{piece.role}` messages"
        )

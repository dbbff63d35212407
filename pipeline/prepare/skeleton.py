"""Where the messages of a conversation land in the text of a chat template.

The texts of the messages are replaced by marks that no text contains, and the template renders that: what stands between
the marks is the template's own, and the real rendering must be those same literals with the real texts between them. So
every text has its place by arithmetic, and nothing is ever searched for by its wording.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alphatoken.pipeline.prepare.chat import REASONING, THOUGHT_ENDS, Messages, Span

STEM = "qzMark"


@dataclass(frozen=True, slots=True)
class Piece:
    """A text that a mark stands for, of message ``message``.

    ``reasoning``: the template may leave it out.
    """

    message: int
    role: str
    text: str
    reasoning: bool = False


@dataclass(frozen=True, slots=True)
class Masked:
    """Messages with marks in place of their texts, and the texts, numbered as the marks are.

    ``opening``: (piece, 0 or 1) where the response continues a message: it begins with the piece, or right after it.
    """

    messages: Messages
    pieces: list[Piece]
    opening: tuple[int, int] | None


def free_stem(texts: Sequence[str]) -> str:
    """A beginning of marks that none of the texts contains."""
    stem = STEM
    while any(stem in text for text in texts):
        stem += "Z"
    return stem


def masked(
    messages: Messages, stem: str, thoughts: re.Pattern[str] | None, begun: tuple[int, int],
    roles: frozenset[str] | None = None, blanks: bool = False,
) -> Masked:  # fmt: skip
    """Replace the texts of ``messages`` by marks.

    Tags of reasoning (``thoughts``) stay, because templates look at them. ``begun``: (message, characters of it that belong
    to the prompt). ``roles``: whose texts are replaced, None for all. ``blanks``: those at the ends of a text stay too.
    """
    made = _Marks(stem, blanks)
    replaced = []
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        new = dict(message)
        if roles is None or role in roles:
            thought = next((message[key] for key in REASONING if isinstance(message.get(key), str)), None)
            if thought is not None:
                shown = made.mark(Piece(i, role, thought, True))
                new |= {key: shown for key in REASONING if message.get(key) == thought}
            if isinstance(content, str):
                cut = begun[1] if i == begun[0] else 0
                new["content"] = made.split(i, role, (content[:cut], content[cut:]), thoughts)
        replaced.append(new)
    return Masked(replaced, made.pieces, made.opening)


class _Marks:
    def __init__(self, stem: str, blanks: bool) -> None:
        self._stem, self._blanks = stem, blanks
        self.pieces: list[Piece] = []
        self.opening: tuple[int, int] | None = None

    def mark(self, piece: Piece, left: bool = True, right: bool = True) -> str:
        """The piece's mark, between the blanks on its left and right where they stay; a blank text stays as it is."""
        text = core = piece.text
        if not text or text.isspace():
            return text
        if self._blanks:
            core = core.lstrip() if left else core
            core = core.rstrip() if right else core
        begin = text.index(core) if self._blanks else 0
        self.pieces.append(piece if core is text else Piece(piece.message, piece.role, core, piece.reasoning))
        return f"{text[:begin]}{self._stem}{len(self.pieces) - 1}z{text[begin + len(core) :]}"

    def split(self, i: int, role: str, halves: tuple[str, str], thoughts: re.Pattern[str] | None) -> str:
        """A content in two halves, the prompt's (mostly empty) and the response's, cut at its tags of reasoning.

        What stands before the last closing tag is reasoning. Blanks where the halves meet stay inside the marks, so that
        the place where they meet is known.
        """
        whole = "".join(halves)
        if thoughts is None or role != "assistant" or not any(end in whole for end in THOUGHT_ENDS):
            thoughts = None
        if thoughts is None and not halves[0]:
            return self.mark(Piece(i, role, whole))
        cut = thoughts.split if thoughts is not None else lambda text: [text]
        before, after = (cut(halves[0]) if halves[0] else []), cut(halves[1])
        parts = before + after
        last = max((k for k, part in enumerate(parts) if part in THOUGHT_ENDS), default=-1)
        out = []
        for k, part in enumerate(parts):
            meets = bool(before) and k in (len(before) - 1, len(before))
            count = len(self.pieces)
            if thoughts is not None and thoughts.fullmatch(part):
                out.append(part)
                continue
            left, right = not (meets and k == len(before)), not (meets and k == len(before) - 1)
            out.append(self.mark(Piece(i, role, part, k < last), left, right))
            if meets and len(self.pieces) > count and self.opening is None:
                self.opening = (count, 0 if k == len(before) else 1)
        return "".join(out)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A rendering of marks: ``literals[k]`` stands before the mark of piece ``landed[k]``, the last one at the end."""

    literals: tuple[str, ...]
    landed: tuple[int, ...]

    @classmethod
    def of(cls, text: str, stem: str) -> "Skeleton":
        """Cut a text with marks."""
        parts = re.split(rf"{stem}(\d+)z", text)
        return cls(tuple(parts[::2]), tuple(map(int, parts[1::2])))

    def after(self, piece: int | None) -> str:
        """The literal that follows a piece, or the one that opens the text (None)."""
        return self.literals[0 if piece is None else self.landed.index(piece) + 1]

    def before(self, piece: int | None) -> str:
        """The literal ahead of a piece, or the one that ends the text (None)."""
        return self.literals[-1 if piece is None else self.landed.index(piece)]

    def neighbour(self, piece: int, step: int) -> int | None:
        """The piece that lands one before (-1) or after (+1) another; None at the ends."""
        at = self.landed.index(piece) + step
        return self.landed[at] if 0 <= at < len(self.landed) else None

    def place(self, text: str, pieces: Sequence[Piece]) -> list[Span] | None:
        """The characters of ``text`` that each landed piece takes, in landing order; None where the text is another one."""
        spans, parts, position = [], [], 0
        for literal, number in zip(self.literals, self.landed, strict=False):
            said = pieces[number].text
            parts += [literal, said]
            start = position + len(literal)
            position = start + len(said)
            spans.append((start, position))
        parts.append(self.literals[-1])
        return spans if "".join(parts) == text else self._walked(text, pieces)

    def _walked(self, text: str, pieces: Sequence[Piece]) -> list[Span] | None:
        """As `place`, where texts may have lost blanks at their ends, or be written as inside a JSON string."""
        spans, position = [], len(self.literals[0])
        if not text.startswith(self.literals[0]):
            return None
        for number, literal in zip(self.landed, self.literals[1:], strict=True):
            for said in _written(pieces[number]):
                end = position + len(said)
                if text.startswith(said, position) and text.startswith(literal, end):
                    break
            else:
                return None
            spans.append((position, end))
            position = end + len(literal)
        return spans if position == len(text) else None


def _written(piece: Piece) -> list[str]:
    """The ways in which a template may write a text; an assistant's only as it is, up to blanks at its ends."""
    text = piece.text
    ways = [text, text.strip(), text.rstrip(), text.lstrip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")]
    if piece.role != "assistant":
        ways += [json.dumps(way, ensure_ascii=strict)[1:-1] for way in ways[:2] for strict in (False, True)]
    return list(dict.fromkeys(ways))


def written(text: str, piece: Piece, start: int, end: int) -> Span | None:
    """The first place between ``start`` and ``end`` where a text of another role than the assistant's is written."""
    for said in _written(piece):
        at = text.find(said, start, end)
        if at >= 0:
            return at, at + len(said)
    return None


def stand_ins(messages: Messages, keys: Sequence[str], call: Any) -> Messages:
    """Messages of one shape: tool calls and strings under ``keys`` replaced by ones that say nothing, other keys left out."""
    shaped = []
    for message in messages:
        kept = {key: message[key] for key in ("role", "content", *REASONING) if key in message}
        for key in keys:
            if key in message:
                value = message[key]
                named = call["id"] if key.endswith("_id") else call["function"]["name"]
                kept[key] = named if isinstance(value, str) else value
        if message.get("tool_calls"):
            kept["tool_calls"] = [call] * len(message["tool_calls"])
        shaped.append(kept)
    return shaped

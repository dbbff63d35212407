"""From token ids to what a person can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel, load_tokenizer
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.remote import here

PART = "�"  # what a tokenizer gives for bytes that are no whole character
LONGEST_CHARACTER = 4  # bytes of UTF-8, so that no character has more tokens
LONGEST = 200  # characters of a token that are shown
CONTINUED = "‥"


class Texts:
    """``decode``: ids -> text. ``trouble``: why ids are shown as numbers, where they are."""

    def __init__(self, decode: Callable[[list[int]], str], trouble: str | None = None) -> None:
        self.decode, self.trouble = decode, trouble
        self._known: dict[int, str] = {}

    @classmethod
    def of(cls, manifest: Manifest) -> Texts:
        """By the run's tokenizer; ids in brackets where that cannot be read any more."""
        model = manifest.content["configuration"].get("model", {})
        place = manifest.stage("prepare")["counts"].get("tokenizer")
        if not place:
            return cls(_numbers, "Tokens are shown as numbers: the run names no tokenizer.")
        source = ModelSource(place, model.get("revision"), trust_remote_code=model.get("trust_remote_code", False))
        try:
            tokenizer = load_tokenizer(here(source, weights=False))
        except UnreadableModel as error:
            return cls(_numbers, f"Tokens are shown as numbers: {str(error).rstrip('.')}.")
        return cls(lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)))

    def one(self, token: int) -> str:
        """The text of a token by itself."""
        if token not in self._known:
            text = self.decode([token])
            self._known[token] = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
        return self._known[token]

    def joined(self, ids: Sequence[int]) -> dict[int, str]:
        """Place -> text, for tokens that are whole characters only together: the first has the text, the others a sign."""
        found: dict[int, str] = {}
        place = 0
        while place < len(ids):
            length = 1
            if PART in self.one(ids[place]):
                length = self._whole(ids[place : place + LONGEST_CHARACTER])
            if length > 1:
                found[place] = self.decode(list(ids[place : place + length]))
                found.update(dict.fromkeys(range(place + 1, place + length), CONTINUED))
            place += length
        return found

    def _whole(self, ids: Sequence[int]) -> int:
        """How many of these tokens make whole characters; 1 where none do."""
        for length in range(2, len(ids) + 1):
            if PART not in self.decode(list(ids[:length])):
                return length
        return 1


def visible(text: str) -> str:
    """A token's text with everything in it to be seen, so that no text moves a cursor or turns the line around."""
    return text.replace("\n", "⏎\n").replace("\t", "→   ").translate(_SEEN) or "∅"


def in_a_line(text: str) -> str:
    """An id, a source or a file name, on one line."""
    return visible(text).replace("⏎\n", "⏎")


def _seen() -> dict[int, str]:
    """Control characters as their pictures; those that order text from right to left, and marks without width, as codes."""
    pictures = {code: chr(0x2400 + code) for code in range(32) if code != 10} | {127: "␡"}
    hidden = [
        *range(0x80, 0xA0),
        0x200B,
        0x200E,
        0x200F,
        0x2028,
        0x2029,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        0xFEFF,
    ]
    return pictures | {code: f"\\u{code:04x}" for code in hidden}


_SEEN = _seen()


def _numbers(ids: list[int]) -> str:
    return "".join(f"[{token}]" for token in ids)

"""Where tokens end in a text, by the bytes that each of them stands for.

A tokenizer of bytes (GPT-2's, Llama 3's, Qwen's) writes every byte of a text into exactly one token, so that the lengths of
its tokens say where they stand. To have it keep offsets instead costs it a tenth of its time, and as much again to look
them up. Other tokenizers drop, add or rewrite characters, and are asked for offsets (`tokenize`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alphatoken.pipeline.prepare.chat import Span
from alphatoken.pipeline.prepare.outcome import IGNORED

_OWN = ("__call__", "_encode_plus")  # what a tokenizer would do otherwise than its backend
_PROBES = ("a", " a", "a  b\n\n c\td ", "é 日本\u00a0🙂\r\n", "<x>  </x>")


class TokenEnds:
    """One tokenizer of bytes.

    ``lengths``: bytes of each token id, 0 where no token has it. ``plain``: its normalizer leaves ASCII alone, and that only.
    """

    def __init__(self, backend: Tokenizer, lengths: npt.NDArray[np.int32], plain: bool) -> None:
        self._backend, self._lengths, self._plain = backend, lengths, plain

    @classmethod
    def of(cls, tokenizer: Any) -> TokenEnds | None:
        """None for a tokenizer that is not one of bytes, or whose own call does more than its backend does."""
        if any(getattr(type(tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name) for name in _OWN):
            return None
        backend = tokenizer.backend_tokenizer
        if not isinstance(backend, Tokenizer) or not isinstance(backend.decoder, decoders.ByteLevel):
            return None
        if not isinstance(backend.normalizer, normalizers.NFC | None):
            return None
        vocabulary, added = backend.get_vocab(with_added_tokens=False), backend.get_added_tokens_decoder()
        alphabet = frozenset(pre_tokenizers.ByteLevel.alphabet())
        lengths = np.zeros(max([*vocabulary.values(), *added], default=0) + 1, np.int32)
        for token, index in vocabulary.items():
            lengths[index] = len(token) if alphabet.issuperset(token) else 0
        for index, one in added.items():
            lengths[index] = len(one.content.encode())
        made = cls(backend, lengths, backend.normalizer is not None)
        for probe in _PROBES:
            ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
            known = made.places(ids, probe) is not None or not (probe.isascii() or backend.normalizer is None)
            if made.ids([probe]) != [ids] or not known:
                return None
        return made

    def ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        """The tokens of each text; None where the tokenizer refuses one of them."""
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception:  # which one, and why, is found out one by one
            return None

    def places(self, ids: npt.ArrayLike, text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        """The bytes of the text at which each token begins and ends; None where they do not add up to the text.

        They do not where a token has taken in the blanks beside it.
        """
        if self._plain and not text.isascii():
            return None
        lengths = self._lengths[np.asarray(ids, np.int64)]
        ends: npt.NDArray[np.int64] = lengths.cumsum(dtype=np.int64)
        whole = len(text) if text.isascii() else len(text.encode())
        return (ends - lengths, ends) if len(ends) and ends[-1] == whole and lengths.all() else None

    def labels(self, ids: Sequence[int], text: str, spans: Sequence[Span]) -> list[int] | None:
        """The ids of the tokens that cover a character of ``spans``, -100 elsewhere; None as `places`."""
        tokens = np.array(ids, np.int64)
        found = self.places(tokens, text)
        if found is None:
            return None
        begins, ends = found
        labels = np.full(len(tokens), IGNORED)
        for start, end in spans if text.isascii() else [_in_bytes(text, span) for span in spans]:
            own = slice(ends.searchsorted(start, "right"), begins.searchsorted(end, "left"))
            labels[own] = tokens[own]
        return labels.tolist()


def _in_bytes(text: str, span: Span) -> Span:
    start, end = span
    before = len(text[:start].encode())
    return before, before + len(text[start:end].encode())

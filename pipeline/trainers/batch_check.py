"""What a batch trains on, compared with what the mask keeps, token by token.

Every sequence of the batch is looked for among the mask's rows by its tokens: it may be a whole row, a part of one that
was cut, or hold rows with something between or around them. Then its labels are compared with that row's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from alphatoken.pipeline.trainers.batch_file import Ints, Sequence, sequences_of
from alphatoken.pipeline.trainers.columns import IGNORED, list_offsets
from alphatoken.pipeline.trainers.source import MaskSource

AS_LABELS, SHIFTED, TWICE = "as labels", "shifted", "shifted back"
LONGEST_LIST = 10


@dataclass(frozen=True, slots=True)
class Difference:
    """One token at which batch and mask differ. ``token``: its index in the mask's row. Labels: -100 is out of the loss."""

    sequence: int
    row: int
    token: int
    token_id: int
    in_batch: int
    in_mask: int


@dataclass(slots=True)
class Verdict:
    """Counts over one batch. Sequences are ``whole`` rows, ``cut`` ones, ``joined`` (rows with more around them) or ``unknown``.

    ``lost``, ``lost_kept``: tokens of cut rows that are not in the batch, and those of them that the mask keeps;
    ``extra``: tokens of the batch that are of no row, ``extra_trained`` those in the loss. ``aligned``: compared
    sequences by where their labels stand. ``trained``: masked tokens that the batch trains on; ``left_out``: kept ones
    that it does not; ``other``: in the loss with another id.
    """

    expected: str
    sequences: int = 0
    tokens: int = 0
    kept: int = 0
    whole: int = 0
    cut: int = 0
    joined: int = 0
    unknown: list[Sequence] = field(default_factory=list)
    lost: int = 0
    lost_kept: int = 0
    extra: int = 0
    extra_trained: int = 0
    rows_joined: int = 0
    aligned: dict[str, int] = field(default_factory=lambda: {AS_LABELS: 0, SHIFTED: 0, TWICE: 0})
    trained: int = 0
    left_out: int = 0
    other: int = 0
    first: list[Difference] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether the batch trains on what the mask keeps, and on nothing else, in whole rows that do not see each other."""
        differ = self.cut or self.unknown or self.trained or self.left_out or self.other or self.extra_trained
        misaligned = any(count for name, count in self.aligned.items() if name != self.expected)
        return bool(self.sequences) and not differ and not misaligned and self.rows_joined <= self.joined


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    ids: Ints
    labels: Ints


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of a sequence that is (part of) a row: from ``start`` of the sequence and ``first`` of the row on."""

    row: _Row
    start: int
    first: int
    length: int


def check(batch: Mapping[str, Ints], source: MaskSource, shifted: bool = False) -> Verdict:
    """Compare a batch (of ``read_batch``) with a mask; ``shifted``: labels have to stand at the predicting position.

    One pass over the mask for whole rows, a second one for what was not found. Raises RunFailed for arrays that do not
    fit together.
    """
    sequences, verdict = sequences_of(batch), Verdict(SHIFTED if shifted else AS_LABELS)
    wanted = defaultdict(list)
    for number, one in enumerate(sequences):
        wanted[one.ids.tobytes()].append(number)
        verdict.sequences, verdict.tokens = verdict.sequences + 1, verdict.tokens + len(one.ids)
    found: dict[int, list[_Piece]] = {}
    for row in _rows(source):
        for number in wanted.get(row.ids.tobytes(), ()):
            piece = _Piece(row, 0, 0, len(row.ids))
            # The same tokens may be in several rows, under other masks where groups decide: the one that fits best.
            if number not in found or _misses(sequences[number], piece) < _misses(sequences[number], found[number][0]):
                found[number] = [piece]
    verdict.whole = len(found)
    rest = {number: one for number, one in enumerate(sequences) if number not in found}
    found |= _partly(rest, source, verdict) if rest else {}
    for number, one in enumerate(sequences):
        if number in found:
            _compare(number, one, found[number], verdict)
        else:
            verdict.unknown.append(one)
    return verdict


def _rows(source: MaskSource) -> Iterator[_Row]:
    """Rows of the mask in their order; of pairs first the chosen branch of some, then the rejected one."""
    number = 0
    columns = [f"{prefix}{name}" for prefix in source.prefixes for name in ("input_ids", "labels")]
    for part in source.parts:
        for batch in source.batches(part, columns):
            for prefix in source.prefixes:
                ids, labels = (batch.column(f"{prefix}{name}") for name in ("input_ids", "labels"))
                borders = list_offsets(ids)
                tokens, own = (c.flatten().to_numpy().astype(np.int64) for c in (ids, labels))
                for index, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
                    yield _Row(number + index, tokens[start:stop], own[start:stop])
            number += batch.num_rows


def _partly(rest: Mapping[int, Sequence], source: MaskSource, verdict: Verdict) -> dict[int, list[_Piece]]:
    """Sequences that are inside a row, or have rows inside; counts what they are."""
    inside: dict[int, list[_Piece]] = {}
    around: dict[int, list[_Piece]] = defaultdict(list)
    texts = {number: one.ids.tobytes() for number, one in rest.items()}
    for row in _rows(source):
        if not len(row.ids):
            continue
        own = row.ids.tobytes()
        for number, text in texts.items():
            if number not in inside and (first := _find(own, text)) is not None:
                inside[number] = [_Piece(row, 0, first, len(rest[number].ids))]
            start = _find(text, own)
            while start is not None:
                around[number].append(_Piece(row, start, 0, len(row.ids)))
                start = _find(text, own, start + 1)
    found = dict(inside)
    for number, pieces in inside.items():
        verdict.cut += 1
        (piece,) = pieces
        verdict.lost += len(piece.row.ids) - piece.length
        outside = np.delete(piece.row.labels, np.s_[piece.first : piece.first + piece.length])
        verdict.lost_kept += int((outside != IGNORED).sum())
        around.pop(number, None)
    for number, pieces in around.items():
        chosen: list[_Piece] = []
        for piece in sorted(pieces, key=lambda one: (one.start, -one.length)):  # longest first, none over another
            if not chosen or piece.start >= chosen[-1].start + chosen[-1].length:
                chosen.append(piece)
        verdict.joined, verdict.rows_joined = verdict.joined + 1, verdict.rows_joined + len(chosen)
        found[number] = chosen
    return found


def _find(text: bytes, part: bytes, start: int = 0) -> int | None:
    """The first token from ``start`` on at which ``part`` stands in ``text``; both are int64 tokens."""
    size = np.dtype(np.int64).itemsize
    at = text.find(part, start * size)
    while at >= 0 and at % size:
        at = text.find(part, at + 1)
    return at // size if at >= 0 else None


def _expected(piece: _Piece, alignment: str) -> Ints:
    """The labels that the mask gives a piece, at their own position or moved by one."""
    labels, stop = piece.row.labels, piece.first + piece.length
    if alignment == SHIFTED:
        return np.append(labels, IGNORED)[piece.first + 1 : stop + 1]
    if alignment == TWICE:
        return np.insert(labels, 0, IGNORED)[piece.first : stop]
    return labels[piece.first : stop]


def _labels(sequence: Sequence, piece: _Piece) -> Ints:
    return sequence.labels[piece.start : piece.start + piece.length]


def _misses(sequence: Sequence, piece: _Piece) -> int:
    return min(int((_labels(sequence, piece) != _expected(piece, way)).sum()) for way in (AS_LABELS, SHIFTED))


def _compare(number: int, sequence: Sequence, pieces: list[_Piece], verdict: Verdict) -> None:
    covered = np.zeros(len(sequence.ids), np.bool_)
    for piece in pieces:
        own = _labels(sequence, piece)
        covered[piece.start : piece.start + piece.length] = True
        ways = (verdict.expected, *(way for way in (AS_LABELS, SHIFTED, TWICE) if way != verdict.expected))
        exact = [way for way in ways if np.array_equal(own, _expected(piece, way))]
        way = exact[0] if exact else verdict.expected
        verdict.aligned[way] += 1
        verdict.kept += int((own != IGNORED).sum())
        theirs = _expected(piece, way)
        trained, left_out = (own != IGNORED) & (theirs == IGNORED), (own == IGNORED) & (theirs != IGNORED)
        other = (own != theirs) & ~trained & ~left_out
        verdict.trained += int(trained.sum())
        verdict.left_out += int(left_out.sum())
        verdict.other += int(other.sum())
        moved = {AS_LABELS: 0, SHIFTED: 1, TWICE: -1}[way]
        for at in np.flatnonzero(own != theirs)[: LONGEST_LIST - len(verdict.first)].tolist():
            token = piece.first + at + moved
            spoken = int(piece.row.ids[token]) if 0 <= token < len(piece.row.ids) else IGNORED
            verdict.first.append(Difference(number, piece.row.number, token, spoken, int(own[at]), int(theirs[at])))
    verdict.extra += int((~covered).sum())
    verdict.extra_trained += int((sequence.labels[~covered] != IGNORED).sum())

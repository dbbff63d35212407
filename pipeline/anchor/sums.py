"""The sum of the parts of a partition, piece by piece: pairs of partial sums are added up a tree.

    four parts:  (p0 + p1) + (p2 + p3)        six:  ((p0 + p1) + (p2 + p3)) + (p4 + p5)

Its shape depends on the number of parts alone, and additions are made element by element, in float32: the bytes of a sum are
the same whoever adds up which piece, and when. A piece is some rows of one parameter, or several small parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from alphatoken.pipeline.anchor.tensor_file import TensorFile, row_bytes, rows_of
from alphatoken.pipeline.anchor.tensors import Shapes, tensor_stream
from alphatoken.pipeline.cluster.work import Lost, Shared
from alphatoken.pipeline.run.storage import Storage

LOGGER = logging.getLogger("alphatoken")
PIECE_BYTES = 32 << 20  # of a sum; what adds it up holds one of them for each level of the tree, and one more


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a tensor's first axis, from ``start`` to before ``stop``."""

    name: str
    start: int
    stop: int


Piece = tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class Term:
    """``weight`` times the sum over ``files`` divided by ``divisor``; None: by nothing, and times nothing."""

    files: tuple[str, ...]
    divisor: int | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class SumFile:
    """A file to be made from sums. ``terms``: added up in order. ``shapes``: of the tensors that it is to hold.
    ``piece_bytes``: at most of a piece, but for a single row that has more.
    """

    output: str
    terms: tuple[Term, ...]
    shapes: Shapes
    metadata: dict[str, str]
    piece_bytes: int = field(default_factory=lambda: PIECE_BYTES)

    def pieces(self) -> list[Piece]:
        """What the file consists of, in the order in which it is written; from the shapes alone."""
        return pieces_of(self.shapes, self.piece_bytes)

    def summed(self, storage: Storage, piece: Piece) -> list[np.ndarray]:
        """The numbers of one piece, an array per slice."""
        with ExitStack() as stack:
            terms = [
                (term, [stack.enter_context(TensorFile(storage, name)) for name in term.files]) for term in self.terms
            ]
            return [self._of(terms, one).numpy() for one in piece]

    @staticmethod
    def _of(terms: Sequence[tuple[Term, Sequence[TensorFile]]], one: Slice) -> torch.Tensor:
        total: torch.Tensor | None = None
        for term, files in terms:
            found = tree_sum(files, one)
            if term.divisor is not None:
                found.div_(term.divisor)
            if total is not None:
                total.add_(found, alpha=1.0 if term.weight is None else term.weight)
            else:
                total = found if term.weight is None else found.mul_(term.weight)
        assert total is not None
        return total


def pieces_of(shapes: Shapes, piece_bytes: int, whole: bool = False) -> list[Piece]:
    """Tensors of these shapes in the order of their names, cut into pieces of at most ``piece_bytes``, but for a single row
    that has more; ``whole``: but for a single tensor, since none is cut."""
    found: list[Piece] = []
    small: list[Slice] = []
    held = 0
    for name in sorted(shapes):
        rows, row = rows_of(shapes[name]), row_bytes(shapes[name])
        if held + rows * row > piece_bytes and small:
            found.append(tuple(small))
            small, held = [], 0
        if rows * row <= piece_bytes:
            small.append(Slice(name, 0, rows))
            held += rows * row
            continue
        step = rows if whole else max(1, piece_bytes // row)
        found += [(Slice(name, start, min(rows, start + step)),) for start in range(0, rows, step)]
    return [*found, tuple(small)] if small else found


def tree_sum(files: Sequence[TensorFile], one: Slice) -> torch.Tensor:
    """The sum over ``files`` as the module says."""
    if len(files) == 1:
        return files[0].rows(one.name, one.start, one.stop)
    half = 1 << (len(files) - 1).bit_length() - 1  # as many leaves as fit a whole tree below all of them
    return tree_sum(files[:half], one).add_(tree_sum(files[half:], one))


@dataclass(frozen=True, slots=True)
class AddTask:
    """Add up one piece and keep it where other workers can read it: ``store`` says how."""

    file: SumFile
    piece: Piece
    store: Callable[[Any], Shared]

    @property
    def output(self) -> str:
        """What it is for, as a worker's log names it."""
        return f"{self.file.output}, {self.piece[0].name} from row {self.piece[0].start}"

    def __call__(self, storage: Storage, advance: Callable[[int], None]) -> Shared | None:
        """The place of the piece; None where there was no room to keep it."""
        try:
            return self.store(self.file.summed(storage, self.piece))
        except Lost as error:
            LOGGER.warning("%s: %s: it is added up by who writes the file", self.output, error)
            return None


@dataclass(frozen=True, slots=True)
class WriteTask:
    """Write the file. ``kept``: number of a piece -> where it is; others are added up on the way."""

    file: SumFile
    kept: dict[int, Shared] = field(default_factory=dict)

    @property
    def output(self) -> str:
        """The file's name."""
        return self.file.output

    def __call__(self, storage: Storage, advance: Callable[[int], None]) -> int:
        """How many pieces were lost with those who kept them, and had to be added up again."""
        again, lost = 0, set[str]()
        with tensor_stream(storage, self.file.output, self.file.shapes, self.file.metadata) as stream:
            for number, piece in enumerate(self.file.pieces()):
                arrays: Sequence[np.ndarray] | None = None
                kept = self.kept.get(number)
                if kept is not None and kept.keeper not in lost:
                    try:
                        arrays = kept.get()
                    except Lost as error:
                        LOGGER.warning("%s: %s: what %s held is added up again", self.output, error, kept.keeper)
                        lost.add(kept.keeper)
                again += kept is not None and arrays is None
                if arrays is None:
                    arrays = self.file.summed(storage, piece)
                for one, array in zip(piece, arrays, strict=True):
                    stream.put(one.name, array)
                advance(1)
        return again

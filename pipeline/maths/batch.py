"""A padded batch of token sequences and the positions that predict its response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED = -100


def response_start(labels: Sequence[int]) -> int:
    """The index of the first response token. Raises StopIteration where there is none."""
    return next(i for i, label in enumerate(labels) if label != IGNORED)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences, unpadded, with identifiers for messages; labels -100 outside the response."""

    ids: list[str]
    input_ids: list[list[int]]
    labels: list[list[int]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(len(row) for row in self.input_ids)

    def take(self, rows: Sequence[int]) -> Sequences:
        """Some of the sequences."""
        return Sequences([self.ids[i] for i in rows], [self.input_ids[i] for i in rows], [self.labels[i] for i in rows])

    def part(self, index: int, parts: int) -> Sequences:
        """The index-th of ``parts`` contiguous parts."""
        n = len(self)
        return self.take(range(index * n // parts, (index + 1) * n // parts))

    def batch(self) -> Batch:
        """All of them, padded on the right, on the host."""
        return collate(self.input_ids, self.labels)


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded sequences. With causal attention no real position sees padding on its right, so none is masked.

    ``input_ids``, ``labels``: (batch, length) int64, labels -100 outside the response. ``lengths``: (batch,) int64.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, length)."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    def predicting(self) -> torch.Tensor:
        """Flat positions p (over batch * length) whose next token is a response token; int64, ascending."""
        following = torch.full_like(self.labels, IGNORED)
        following[:, :-1] = self.labels[:, 1:]
        return (following != IGNORED).flatten().nonzero().squeeze(1)

    def real(self) -> torch.Tensor:
        """Flat positions that hold a token and not padding; int64, ascending."""
        positions = torch.arange(self.shape[1], device=self.lengths.device)
        return (positions < self.lengths[:, None]).flatten().nonzero().squeeze(1)

    def rows(self, rows: slice | torch.Tensor) -> Batch:
        """The batch of some of the sequences, with the padding that they need."""
        longest = int(self.lengths[rows].max())
        return Batch(self.input_ids[rows, :longest], self.labels[rows, :longest], self.lengths[rows])

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(self.input_ids.to(device), self.labels.to(device), self.lengths.to(device))


def collate(input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> Batch:
    """Pad unpadded sequences on the right: ids with 0 (never seen by a real position), labels with -100."""
    lengths = torch.tensor([len(ids) for ids in input_ids])
    size = (len(input_ids), int(lengths.max()))
    ids, targets = torch.zeros(size, dtype=torch.int64), torch.full(size, IGNORED, dtype=torch.int64)
    for row, (one_ids, one_labels) in enumerate(zip(input_ids, labels, strict=True)):
        ids[row, : len(one_ids)] = torch.as_tensor(one_ids, dtype=torch.int64)
        targets[row, : len(one_labels)] = torch.as_tensor(one_labels, dtype=torch.int64)
    return Batch(ids, targets, lengths)


def by_token_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequences, longest first, so that the padded size of a group is at most ``budget`` tokens.

    A sequence that alone is longer than the budget is a group of its own. Returns the indices of every group; ties in
    length are broken by index, so that the grouping depends on the lengths alone.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups

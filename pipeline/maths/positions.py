"""Some positions of a batch, for visitors that add something up for each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alphatoken.pipeline.maths.capture import Captured


class Positions:
    """``flat``: positions over batch * length, each once; ``shape``: (batch, length)."""

    def __init__(self, flat: torch.Tensor, shape: tuple[int, int]) -> None:
        self.flat, self.device = flat, flat.device
        self._index = torch.full((shape[0] * shape[1],), -1, dtype=torch.int64, device=flat.device)
        self._index[flat] = torch.arange(len(flat), device=flat.device)

    def __len__(self) -> int:
        return len(self.flat)

    def of(self, captured: Captured) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of what was captured that belong to these positions, and which of them each belongs to; None: in order.

        An expert sees some of the positions, and one that a token picks twice sees it twice.
        """
        if captured.rows is None:
            return self.flat, None
        target = self._index[captured.rows]
        rows = (target >= 0).nonzero().squeeze(1)
        return rows, target[rows]

    def add(
        self,
        total: torch.Tensor,
        target: torch.Tensor | None,
        found: torch.Tensor,
        lines: Sequence[int] = (0,),
        start: int = 0,
    ) -> None:
        """Add ``found`` (len(lines), rows) to the ``lines`` of ``total`` (n, positions).

        ``target``: of ``of``, for rows from ``start`` on.
        """
        stop = start + found.shape[1]
        for line, one in zip(lines, found, strict=True):
            if target is None:
                total[line, start:stop] += one
            else:
                total[line].index_add_(0, target[start:stop], one)

"""A worker that takes the sequences of a shard through a model, batch by batch.

Batches are formed within a shard from length-sorted rows by a token budget, so that results do not depend on the number
of workers; the budget is halved where the device runs out of memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from alphatoken.pipeline.maths.batch import Batch, by_token_budget, collate
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.settings import Settings

CPU_TOKENS = 2048
BYTES_PER_TOKEN_SAFETY = 0.5


class BatchedWorker:
    """What workers share that compute float columns of token sequences; they say which, and how for one batch."""

    columns: tuple[str, ...]

    def __init__(self, settings: Settings, runs_a_model: bool = True) -> None:
        """Without a model to run the device is the CPU, whatever there is."""
        self.settings = settings
        self.device = torch.device("cuda" if runs_a_model and torch.cuda.is_available() else "cpu")
        self.budget = token_budget(settings.valuation.tokens_per_batch, self.device)
        self.device_lock = threading.Lock()  # two shards are in flight: one computes, the other is read or written

    def score(
        self, ids: list[str], input_ids: list[list[int]], labels: list[list[int]], advance: Callable[[int], None]
    ) -> tuple[dict[str, list[np.ndarray]], int]:
        """Column name -> one float32 array per sequence, and the number of tokens with padding.

        ``ids`` name the sequences in messages.
        """
        columns = {name: [np.zeros(len(row), np.float32) for row in input_ids] for name in self.columns}
        padded, budget = 0, self.budget
        waiting = self._collated(range(len(ids)), input_ids, labels)
        with self.device_lock:  # for the whole shard: else two would end together, and the device wait for the next two
            if budget != self.budget:  # the other shard has found meanwhile that the device holds less
                waiting = self._collated(range(len(ids)), input_ids, labels)
            while waiting:
                group, batch = waiting.popleft()
                try:
                    found = self._values(batch.to(self.device), [ids[i] for i in group])
                except NonFinite as error:
                    raise RunFailed(
                        f"NaN or infinity in {error.where}, example {ids[group[error.row]]}: check the model or its dtype"
                    ) from error
                except torch.OutOfMemoryError as error:
                    if len(group) == 1:
                        raise RunFailed(
                            f"example {ids[group[0]]} with {len(input_ids[group[0]])} tokens does not fit into the "
                            "device's memory: set a smaller data.max_length"
                        ) from error
                    torch.cuda.empty_cache()
                    self.budget = max(1, batch.shape[0] * batch.shape[1] // 2)
                    rest = [*group, *(i for later, _ in waiting for i in later)]
                    waiting = self._collated(rest, input_ids, labels)
                    continue
                for row, index in enumerate(group):
                    for name in self.columns:
                        columns[name][index][:] = found[name][row, : len(input_ids[index])]
                padded += batch.shape[0] * batch.shape[1]
                advance(int(batch.lengths.sum()))
        return columns, padded

    def _collated(
        self, rows: Sequence[int], input_ids: list[list[int]], labels: list[list[int]]
    ) -> deque[tuple[list[int], Batch]]:
        """The batches of some of the sequences, on the host, and the sequences in each."""
        groups = [[rows[i] for i in g] for g in by_token_budget([len(input_ids[i]) for i in rows], self.budget)]
        return deque((g, collate([input_ids[i] for i in g], [labels[i] for i in g])) for g in groups)

    def _values(self, batch: Any, ids: list[str]) -> dict[str, np.ndarray]:
        """Column name -> (batch, length) float32 on the host, for a batch on the device and the names of its rows."""
        raise NotImplementedError  # each kind of worker has its own


def token_budget(setting: int | str, device: torch.device) -> int:
    """Padded tokens per batch: as set, or a start that is halved when the device runs out of memory."""
    if isinstance(setting, int):
        return setting
    if device.type == "cpu":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    return max(CPU_TOKENS, int(free * BYTES_PER_TOKEN_SAFETY) // (1 << 20))


def as_lists(rows: Sequence[np.ndarray]) -> pa.ListArray:
    """Rows of different lengths as one list<float> column, without a Python object per number."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.concatenate(rows) if rows else np.zeros(0, np.float32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.float32()))

"""The sequences of a shard through a model, batch by batch.

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

from alphatoken.pipeline.maths.batch import Batch, Sequences, by_token_budget
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.run.failure import RunFailed

CPU_TOKENS = 2048
BYTES_PER_TOKEN_SAFETY = 0.5

# For a batch on the device: column name -> (batch, length) float32 on the host.
Columns = dict[str, np.ndarray]


class TokenBatches:
    """Owned by a worker; ``device``: where batches of its model go."""

    def __init__(self, tokens_per_batch: int | str, device: torch.device) -> None:
        self.device = device
        self.budget = token_budget(tokens_per_batch, self.device)
        self.device_lock = threading.Lock()  # two shards are in flight: one computes, the other is read or written

    def score(
        self,
        sequences: Sequences,
        names: Sequence[str],
        of_batch: Callable[[Batch], Columns],
        advance: Callable[[int], None],
    ) -> tuple[dict[str, list[np.ndarray]], int]:
        """Column name -> one float32 array per sequence, and the number of tokens with padding."""
        columns = {name: [np.zeros(len(row), np.float32) for row in sequences.input_ids] for name in names}
        padded, budget = 0, self.budget
        waiting = self._collated(range(len(sequences)), sequences)
        with self.device_lock:  # for the whole shard: else two would end together, and the device wait for the next two
            if budget != self.budget:  # the other shard has found meanwhile that the device holds less
                waiting = self._collated(range(len(sequences)), sequences)
            while waiting:
                group, batch = waiting.popleft()
                try:
                    found = of_batch(batch.to(self.device))
                except NonFinite as error:
                    name = sequences.ids[group[error.row]]
                    raise RunFailed(
                        f"NaN or infinity in {error.where}, example {name}: check the model or its dtype"
                    ) from error
                except torch.OutOfMemoryError as error:
                    if len(group) == 1:
                        raise RunFailed(
                            f"example {sequences.ids[group[0]]} with {len(sequences.input_ids[group[0]])} tokens does not "
                            "fit into the device's memory: set a smaller data.max_length"
                        ) from error
                    torch.cuda.empty_cache()
                    self.budget = max(1, batch.shape[0] * batch.shape[1] // 2)
                    waiting = self._collated([*group, *(i for later, _ in waiting for i in later)], sequences)
                    continue
                for row, index in enumerate(group):
                    for name in names:
                        columns[name][index][:] = found[name][row, : len(sequences.input_ids[index])]
                padded += batch.shape[0] * batch.shape[1]
                advance(int(batch.lengths.sum()))
        return columns, padded

    def _collated(self, rows: Sequence[int], sequences: Sequences) -> deque[tuple[list[int], Batch]]:
        """The batches of some of the sequences, on the host, and the sequences in each."""
        lengths = [len(sequences.input_ids[i]) for i in rows]
        groups = [[rows[i] for i in group] for group in by_token_budget(lengths, self.budget)]
        return deque((group, sequences.take(group).batch()) for group in groups)


def token_budget(setting: int | str, device: torch.device) -> int:
    """Padded tokens per batch: as set, or a start that is halved when the device runs out of memory."""
    if isinstance(setting, int):
        return setting
    if device.type == "cpu":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    return max(CPU_TOKENS, int(free * BYTES_PER_TOKEN_SAFETY) // (1 << 20))


def as_lists(rows: Sequence[Any]) -> pa.ListArray:
    """Rows of different lengths as one list<float> column, without a Python object per number."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.concatenate(rows) if rows else np.zeros(0, np.float32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.float32()))

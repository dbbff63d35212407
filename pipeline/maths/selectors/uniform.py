"""valuation.method=random: every token the same chance. The comparison that any selector has to win.

    score ~ uniform on [0, 1)                                                   higher: keep

Drawn from run.seed and the example's id alone, so that shards, batches and workers do not matter. Runs no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from alphatoken.pipeline.maths.batch import IGNORED, Batch


class Uniform:
    """A number per token, independent of everything but seed, id and index."""

    models: ClassVar[tuple[str, ...]] = ()

    def __init__(self, models: dict[str, Any], attention: str, seed: int) -> None:
        self.seed = seed

    def __call__(self, batch: Batch, ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """See Selector; ``loss`` is 0.0, since no model is run."""
        rows, length = batch.shape
        drawn = np.stack([self._draw(name, length) for name in ids]) if rows else np.zeros((0, length), np.float32)
        score = torch.from_numpy(drawn).to(batch.labels.device)
        return {"score": score.masked_fill(batch.labels == IGNORED, 0.0), "loss": torch.zeros_like(score)}

    def _draw(self, name: str, length: int) -> np.ndarray:
        key = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        bits = np.random.PCG64(int.from_bytes(key[:16], "little"))
        # 24 bits are a float32 exactly; the raw stream of a bit generator is the same in every version of numpy.
        return (bits.random_raw(length) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)

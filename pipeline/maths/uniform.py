"""mask.score=random: every token the same chance. The comparison that any score has to win. numpy alone."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def uniform(seed: int, name: str, length: int) -> npt.NDArray[np.float32]:
    """``(length,)`` numbers in [0, 1), one per token, drawn from the seed and the example's name alone.

    Shards, batches and workers do not matter, and an example keeps its numbers when others come or go.
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    bits = np.random.PCG64(int.from_bytes(key[:16], "little"))
    # 24 bits are a float32 exactly; the raw stream of a bit generator is the same in every version of numpy.
    return (bits.random_raw(length) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)

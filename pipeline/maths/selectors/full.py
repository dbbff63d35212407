"""valuation.method=full: keep everything, through the same files. What training without a mask would see.

score = 0                               mask keeps every response token and leaves mask.rho and mask.rule unused
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from alphatoken.pipeline.maths.batch import Batch


class KeepEverything:
    """Zeros. Runs no model."""

    models: ClassVar[tuple[str, ...]] = ()

    def __init__(self, models: dict[str, Any], attention: str, seed: int) -> None:
        """Nothing is needed."""

    def __call__(self, batch: Batch, ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """See Selector; ``loss`` is 0.0, since no model is run."""
        zeros = torch.zeros(batch.shape, device=batch.labels.device)
        return {"score": zeros, "loss": zeros}

"""Other ways to choose tokens, behind the same files as AlphaToken's values (valuation.method).

A selector is one small file. It is called with a batch and its examples' ids, and gives a ``score`` (higher: keep) and,
where it runs the policy, the ``loss`` of every response token. None needs directions, so none needs the anchor stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.selectors.entropy import HighEntropy
from alphatoken.pipeline.maths.selectors.excess_loss import ExcessLoss
from alphatoken.pipeline.maths.selectors.full import KeepEverything
from alphatoken.pipeline.maths.selectors.loss import LowLoss
from alphatoken.pipeline.maths.selectors.uniform import Uniform


class Selector(Protocol):
    """``models``: the names, policy and reference, of those that it runs."""

    models: ClassVar[tuple[str, ...]]

    def __init__(self, models: dict[str, Any], attention: str, seed: int) -> None:
        """``models``: by name; ``attention``: the kernel that they run with; ``seed``: run.seed."""

    def __call__(self, batch: Batch, ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """``score`` and ``loss`` (nats; 0.0 where the policy is not run), (batch, length) float32.

        Index i speaks of token i as a PREDICTED token; 0.0 outside the response. A score depends on its own example
        alone. Raises NonFinite.
        """


SELECTORS: dict[str, type[Selector]] = {
    "excess_loss": ExcessLoss,
    "loss": LowLoss,
    "entropy": HighEntropy,
    "random": Uniform,
    "full": KeepEverything,
}

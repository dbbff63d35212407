"""The guard of the maths where a stage has a model in its hands: refusals become messages of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel
from alphatoken.pipeline.maths.guard import Guard
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.settings import Settings


class Engine:
    """Called with the token ids of every shard before a number is made from it; returns what the manifest records.

    ``named``: the key of the model. Raises RunFailed where the engine's forward pass is not the model's own.
    """

    def __init__(self, scored: ScoredLayers, settings: Settings, named: str = "model.policy") -> None:
        window = settings.valuation.window if "paper" in settings.valuation.scores else 0
        self.guard, self.named = Guard(scored, settings.model.attention, window), named

    def __call__(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """See the class; a second call with no longer row costs nothing."""
        try:
            return asdict(self.guard(rows))
        except UnsupportedModel as error:
            raise RunFailed(f"{self.named}: {error}") from error


def together(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several workers: rows add up, of everything else the largest."""
    found: dict[str, Any] = {}
    for record in records:
        for key, value in record.items():
            found[key] = found.get(key, 0) + value if key == "rows" else max(found.get(key, value), value)
    return found

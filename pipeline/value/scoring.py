"""Where columns come from: token valuers at the snapshots that are valued with one model, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from alphatoken.pipeline.anchor.coverage import checked_layers
from alphatoken.pipeline.anchor.engine import Engine
from alphatoken.pipeline.anchor.tensors import mapped_tensors
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.decoder import UnsupportedModel
from alphatoken.pipeline.maths.directions import NAMES, Directions
from alphatoken.pipeline.maths.forward import token_losses_of
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.placement import offloaded_layers
from alphatoken.pipeline.maths.valuer import TokenValuer, looks_at_layers
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

OWN_LOSS = "own_loss"  # under model.policy itself, also where snapshots bring weights of their own


class Scoring:
    """Called with a batch on the model's device. ``columns``: the names of what it returns.

    ``snapshots``: the numbers of those that are valued with this model; none where no score looks at a direction.
    ``weighed``: with OWN_LOSS. It belongs to the model that is going to be trained; a warm-up is no preference training.
    """

    def __init__(
        self, model: Any, storage: Storage, settings: Settings, snapshots: Sequence[int], weighed: bool = False
    ) -> None:
        valuation, self.weighed = settings.valuation, weighed
        scores = [*valuation.scores, *(["loss"] if weighed and "loss" not in valuation.scores else [])]
        if looks_at_layers([*scores, *["exact"] * valuation.exact]):
            checked_layers(model, settings)
        others = settings.objectives if "paper" in valuation.scores else ()
        directions: list[Directions | None] = [directions_of(storage, index, others) for index in snapshots]
        try:
            self.valuers = [
                TokenValuer(
                    model,
                    each,
                    valuation.layers,
                    valuation.window,
                    settings.model.attention,
                    scores,
                    valuation.exact,
                )
                for each in directions or [None]
            ]
        except UnsupportedModel as error:
            raise RunFailed(f"model.policy: {error}") from error
        self.model, self.attention = model, settings.model.attention
        self.engine = Engine(self.valuers[0].scored, settings)
        self.offloaded = offloaded_layers(self.valuers[0].scored.lower)
        self.columns: list[str] = [*self.valuers[0].columns, *([OWN_LOSS] if weighed else [])]

    def checked(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What the manifest records of the engine, once these rows of token ids are known to go through it unchanged.

        Raises RunFailed where they do not.
        """
        return {**self.engine(rows), "causal_layers": self.valuers[0].causal_layers, "offloaded_layers": self.offloaded}

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        """Column name -> (batch, length) float32 on the host: the mean over the snapshots, brought there in one copy."""
        names = self.valuers[0].columns
        swapped = any(valuer.weights is not None for valuer in self.valuers)
        apart = self.weighed and swapped
        total, own = torch.zeros(()), None
        with lower_layers_once(self.valuers[0].scored) if apart or len(self.valuers) > 1 else nullcontext():
            if apart:
                own = token_losses_of(self.model, batch, self.attention)
            for valuer in self.valuers:
                found = valuer.value(batch)
                total = total.to(batch.input_ids.device) + torch.stack([found[name] for name in names]).float()
        host = dict(zip(names, (total / len(self.valuers)).cpu().numpy(), strict=True))
        if self.weighed:
            host[OWN_LOSS] = host["loss"] if own is None else own.cpu().numpy()
        return host


def directions_of(storage: Storage, snapshot: int, others: Sequence[str] = ()) -> Directions:
    """The directions at a snapshot, and its own scored weights where they are not the model's. ``others``: directions beside
    adaptation and stability. One copy on a node, mapped by all of its workers."""
    place = f"anchors/snapshot-{snapshot:02d}"
    named = {name: mapped_tensors(storage, f"{place}/{name}.safetensors") for name in (*NAMES, *others)}
    own = f"{place}/policy.safetensors"
    return Directions(named, mapped_tensors(storage, own) if storage.exists(own) else None)

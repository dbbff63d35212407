"""The value stage's workers: one values parts of values/, one reads the reference's log-probabilities into reference/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from alphatoken.data_schemas import REFERENCE_LOSS
from alphatoken.pipeline.anchor.engine import Engine
from alphatoken.pipeline.anchor.loading import held_model
from alphatoken.pipeline.cluster.token_batches import TokenBatches
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel, no_scored_layers
from alphatoken.pipeline.maths.forward import token_losses_of
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.placement import device_of
from alphatoken.pipeline.prepare.windows import with_what_follows
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.value.kinds import Kind, Rows
from alphatoken.pipeline.value.own_step import OwnStepValues
from alphatoken.pipeline.value.scoring import OWN_LOSS, Scoring

LOGPS = "logps"


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference's log-probabilities: the fingerprint of their files, and whether the policy is the reference."""

    fingerprint: str
    is_policy: bool


@dataclass(frozen=True, slots=True)
class ValueTask:
    """One shard: the part's file name, the fingerprint that its values carry, and the directory for them."""

    part: str
    fingerprint: str
    place: str = "values"
    first: int = 0  # the part's first row among all rows


class ValueWorker:
    """Holds the policy and the directions, and values one shard after the other.

    ``reference``: where the reference's log-probabilities are, which values of pairs and the column reference_loss need;
    None: not needed. Where the policy is the reference its own are stored as the reference's. ``overlap``: tokens that windows
    of a row share, None where no rows are split; the response tokens there count among what follows a window's own.
    """

    def __init__(
        self,
        storage: Storage,
        source: ModelSource,
        settings: Settings,
        snapshots: Sequence[int],
        kind: Kind,
        reference: Reference | None,
        overlap: int | None = None,
    ) -> None:
        self.overlap = overlap
        self.storage, self.kind, self.reference = storage, kind, reference
        self.names = settings.columns
        model = held_model(source, settings)
        self.batches = TokenBatches(settings.valuation.tokens_per_batch, device_of(model))
        self.scoring = Scoring(model, storage, settings, snapshots, kind.weighed)
        self.own_step: OwnStepValues | None = None
        if settings.valuation.own_step:
            objectives = ("adaptation", "stability", *settings.objectives)
            self.own_step = OwnStepValues(storage, settings.anchor.unroll.orders, objectives)

    def __call__(self, task: ValueTask, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write one part of values, and where the policy is the reference one of reference/; returns counts."""
        table = self.storage.read_table(f"prepared/{task.part}", self.kind.prepared)
        sequences = self.kind.sequences(table)
        with self.batches.device_lock:
            engine = self.scoring.checked(sequences.input_ids)
        seen, borrowed = with_what_follows(sequences, self.overlap) if self.overlap else (sequences, [])
        columns, padded = self.batches.score(seen, self.scoring.columns, self.scoring, advance)
        for row, tokens in enumerate(borrowed):
            for values in columns.values() if tokens else ():
                values[row][-tokens:] = 0.0  # theirs are those of the later window
        if self.own_step is not None:
            columns |= self.own_step.columns(sequences, task.first)
        own = _negated(columns[OWN_LOSS]) if self.kind.weighed else None
        theirs = self._theirs(task.part, table, own)
        if REFERENCE_LOSS in self.names:
            assert theirs is not None
            columns[REFERENCE_LOSS] = _negated(theirs)
        values = self.kind.values(table, columns, own, theirs, self.names)
        counts = {"tokens": sequences.tokens, "padded_tokens": padded}
        self.storage.write_table(f"{task.place}/{task.part}", values, task.fingerprint, counts)
        # What depends on the worker is no part of the file, whose bytes do not.
        return {**counts, "engine": engine}

    def _theirs(self, part: str, table: pa.Table, own: Rows | None) -> Rows | None:
        """The reference's log-probabilities, one array per sequence."""
        if self.reference is None:
            return None
        if self.reference.is_policy:
            assert own is not None
            made = self.kind.with_logps(table.column("id"), own)
            self.storage.write_table(f"reference/{part}", made, self.reference.fingerprint)
            return own
        return self.kind.logps(self.storage.read_table(f"reference/{part}", self.kind.reference))


class ReferenceWorker:
    """Holds the reference model alone, so that no worker holds two; a forward pass per batch."""

    def __init__(
        self, storage: Storage, source: ModelSource, settings: Settings, kind: Kind, vocabulary: int | None
    ) -> None:
        """``vocabulary``: ids in prepared/ are below it."""
        self.storage, self.kind, self.attention = storage, kind, settings.model.attention
        self.model = held_model(source, settings, "model.reference")
        self.batches = TokenBatches(settings.valuation.tokens_per_batch, device_of(self.model))
        self.engine = Engine(_headed(self.model), settings, "model.reference")
        size = int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]  # an nn.Module to mypy
        if vocabulary is not None and size < vocabulary:
            raise RunFailed(
                f"model.reference knows {size} token ids, the data has {vocabulary}: it needs the policy's tokenizer"
            )

    def __call__(self, task: ValueTask, advance: Callable[[int], None]) -> dict[str, int]:
        """Write one part of reference/; returns counts."""
        table = self.storage.read_table(f"prepared/{task.part}", self.kind.prepared)
        sequences = self.kind.sequences(table)
        with self.batches.device_lock:
            self.engine(sequences.input_ids)
        columns, _ = self.batches.score(sequences, [LOGPS], self._logps, advance)
        made = self.kind.with_logps(table.column("id"), columns[LOGPS])
        self.storage.write_table(f"{task.place}/{task.part}", made, task.fingerprint)
        return {"rows": table.num_rows, "tokens": sequences.tokens}

    def _logps(self, batch: Batch) -> dict[str, np.ndarray]:
        return {LOGPS: 0.0 - token_losses_of(self.model, batch, self.attention).cpu().numpy()}


def _headed(model: Any) -> ScoredLayers:
    try:
        return no_scored_layers(model)
    except UnsupportedModel as error:
        raise RunFailed(f"model.reference: {error}") from error


def _negated(rows: Rows) -> list[np.ndarray]:
    return [0.0 - row for row in rows]  # and not -0.0

"""The rehearsal's worker: holds the policy and nothing of the course, so that any of them can do any lane of any step.

What it makes for others, it puts into the store: hidden states, and the sums of gradients piece by piece.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from alphatoken.pipeline.anchor.coverage import checked_layers
from alphatoken.pipeline.anchor.engine import Engine
from alphatoken.pipeline.anchor.loading import held_model
from alphatoken.pipeline.cluster.work import Lost, Shared
from alphatoken.pipeline.maths.batch import Batch, collate
from alphatoken.pipeline.maths.decoder import UnsupportedModel
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.nonfinite import NonFinite
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.placement import device_of
from alphatoken.pipeline.maths.rehearsal import RehearsedModel
from alphatoken.pipeline.maths.valuer import TokenValuer
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.value.rehearsal_pieces import MASTER, Names, Own, PieceTask, Store, Tensors, on_host, stored


@dataclass(frozen=True, slots=True)
class Hidden:
    """The hidden state that enters the first scored layer, as bytes: numpy knows no bfloat16."""

    content: np.ndarray
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Hidden:
        """From any device."""
        return cls(tensor.cpu().contiguous().view(torch.uint8).numpy(), tensor.dtype)

    def tensor(self, device: torch.device) -> torch.Tensor:
        """A copy on ``device``."""
        return torch.tensor(self.content).view(self.dtype).to(device)


@dataclass(frozen=True, slots=True)
class Group:
    """Examples of one pass; ``hidden``: their Hidden in the store, where it is known."""

    ids: Sequence[str]
    input_ids: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    hidden: Shared | None = None


@dataclass(frozen=True, slots=True)
class LaneTask:
    """``what``: values | direction | gradient. ``lanes``: one of them, or of a gradient all, which are added in their order.

    ``weights``: the scored weights at ``step``, ``directions``: made at ``directed``; both by piece.
    """

    what: str
    step: int
    weights: Sequence[Shared]
    pieces: Sequence[Names]
    store: Store
    lanes: Sequence[Sequence[Group]] = ()
    part: str = ""  # its name in the worker's log
    directed: int = -1
    directions: Sequence[Shared] = ()


@dataclass(frozen=True, slots=True)
class LaneResult:
    """``columns``: of each group (columns of values/, rows, length). ``total``: the summed gradient, by piece, ``tokens``
    and ``losses`` (nats, by lane) of its labelled tokens. ``hidden``: of each group, where it was not given."""

    columns: list[np.ndarray] = field(default_factory=list)
    total: Sequence[Shared] = ()
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    hidden: list[Shared | None] = field(default_factory=list)


class RehearsalWorker:
    """Called with one task after the other; weights and directions stay on the device until others are named."""

    def __init__(
        self, storage: Storage, source: ModelSource, reference: ModelSource | None, settings: Settings
    ) -> None:
        model = held_model(source, settings)
        self.device = device_of(model)
        self.scored = checked_layers(model, settings)
        valuation = settings.valuation
        self.columns = valuation.columns
        self.model = RehearsedModel(
            self.scored, valuation.window, settings.model.attention, valuation.scores, valuation.exact
        )
        own_reference = None if reference is None else partial(_weights_of, reference, settings)
        self.own = Own(storage, valuation.rehearsal.learning_rate, self.scored.weights, own_reference)
        self.weights: tuple[int, Tensors] = (-1, {})
        self.valuer: tuple[int, TokenValuer | None] = (-1, None)
        self.engine = Engine(self.scored, settings)
        self.device_lock = threading.Lock()  # two shards are in flight, one at a time uses the model

    def __call__(self, task: LaneTask | PieceTask | None, advance: Callable[[int], None]) -> Any:
        """Run a task and return its result; Lost where something that it needs is gone. None: there is nothing to do."""
        if task is None:
            return None
        try:
            with self.device_lock:
                if not isinstance(task, LaneTask):
                    return task(self.own)
                return self._values(task, advance) if task.what == "values" else self._gradient(task)
        except Lost as error:
            return error

    def _values(self, task: LaneTask, advance: Callable[[int], None]) -> LaneResult:
        weights, valuer, result = self._weights(task), self._valuer(task), LaneResult()
        for group in (group for lane in task.lanes for group in lane):
            self.engine([row.tolist() for row in group.input_ids])
            batch, hidden = self._batch(group)
            found = self._safely(group, partial(self.model.values, valuer, weights, batch, hidden))
            result.columns.append(torch.stack([found[name] for name in self.columns]).float().cpu().numpy())
            result.hidden.append(self._new(task, group, hidden))
            advance(int(batch.lengths.sum()))
        return result

    def _gradient(self, task: LaneTask) -> LaneResult:
        weights, tokens = self._weights(task), 0
        total: Tensors = {}
        lane_losses: list[float] = []
        new: list[Shared | None] = []
        for lane in task.lanes:
            own, loss = OuterSum(self.scored), 0.0
            for group in lane:
                batch, hidden = self._batch(group)
                losses = self._safely(
                    group, partial(self.model.add_gradient, own, weights, batch, hidden, task.what == "direction")
                )
                tokens, loss = tokens + len(losses), loss + float(losses.double().sum())
                new.append(self._new(task, group, hidden))
            lane_losses.append(loss)
            for name, tensor in own.total.items():  # in float32, as sums of single lanes are added
                total[name] = total[name].add_(tensor.float()) if name in total else tensor.float()
        pieces = [stored(task.store, {name: on_host(total.pop(name)) for name in names}) for names in task.pieces]
        return LaneResult(total=pieces, tokens=tokens, losses=lane_losses, hidden=new)

    def _batch(self, group: Group) -> tuple[Batch, list[torch.Tensor]]:
        hidden = [] if group.hidden is None else [group.hidden.get().tensor(self.device)]
        return collate([row.tolist() for row in group.input_ids], [row.tolist() for row in group.labels]).to(
            self.device
        ), hidden

    def _safely(self, group: Group, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except NonFinite as error:
            raise RunFailed(
                f"NaN or infinity in {error.where}, example {group.ids[error.row]}: check the model or its dtype, or set a "
                "smaller valuation.rehearsal.learning_rate"
            ) from error
        except torch.OutOfMemoryError as error:
            size = f"{len(group.ids)} examples of at most {max(map(len, group.input_ids))} tokens"
            raise RunFailed(
                f"{size} do not fit into the device's memory: set a smaller valuation.tokens_per_batch or data.max_length"
            ) from error

    def _weights(self, task: LaneTask) -> Tensors:
        if self.weights[0] != task.step:
            self.weights = (-1, {})  # let go of before others come
            self.weights = (task.step, self._on_device(task.weights)[MASTER])
        return self.weights[1]

    def _valuer(self, task: LaneTask) -> TokenValuer:
        if self.valuer[1] is None or self.valuer[0] != task.directed:
            self.valuer = (-1, None)
            named = self._on_device(task.directions)
            try:
                self.valuer = (task.directed, self.model.valuer(named))
            except UnsupportedModel as error:
                raise RunFailed(f"model.policy: {error}") from error
        valuer = self.valuer[1]
        assert valuer is not None
        return valuer

    def _on_device(self, pieces: Sequence[Shared]) -> dict[str, Tensors]:
        """Kind -> parameter name -> a copy in the model's dtype: what comes from the store cannot be written to."""
        dtypes = {linear.name: linear.parameter.dtype for linear in self.scored.maps}
        found: dict[str, Tensors] = {}
        for piece in pieces:
            for key, array in piece.get().items():
                kind, _, name = key.partition("/")
                found.setdefault(kind, {})[name] = torch.tensor(array).to(self.device, dtypes[name])
        return found

    @staticmethod
    def _new(task: LaneTask, group: Group, hidden: list[torch.Tensor]) -> Shared | None:
        """None where it was given, or where no pass was needed since nothing is labelled."""
        return stored(task.store, Hidden.of(hidden[0])) if group.hidden is None and hidden else None


def _weights_of(source: ModelSource, settings: Settings) -> Tensors:
    """The scored weights of another model, on the host."""
    return checked_layers(load_model(here(source), torch.device("cpu")), settings).weights()

"""The rehearsal's worker: holds the policy and nothing of the course, so that any of them can do any lane of any step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from alphatoken.pipeline.anchor.coverage import checked_layers
from alphatoken.pipeline.anchor.engine import Engine
from alphatoken.pipeline.anchor.loading import held_model
from alphatoken.pipeline.cluster.work import Shared
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

Arrays = Mapping[str, np.ndarray]


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
    """Examples of one pass; ``hidden``: their Hidden in the object store, where it is known."""

    ids: Sequence[str]
    input_ids: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    hidden: Shared | None = None


@dataclass(frozen=True, slots=True)
class LaneTask:
    """``what``: policy | reference (their scored weights) | direction | values | gradient, the last three of ``groups``.

    ``weights``: the scored weights at ``step``, ``directions``: made at ``directed``; both parameter name -> float32.
    """

    what: str
    part: str = ""  # its name in the worker's log
    groups: Sequence[Group] = ()
    step: int = -1
    weights: Shared | None = None
    directed: int = -1
    directions: Shared | None = None


@dataclass(frozen=True, slots=True)
class LaneResult:
    """``columns``: of each group (columns of values/, rows, length). ``total``: the summed gradient over the lane, ``tokens``
    and ``loss`` (nats) of its labelled tokens. ``hidden``: of each group, where it was not given."""

    columns: list[np.ndarray] = field(default_factory=list)
    total: Arrays = field(default_factory=dict)
    tokens: int = 0
    loss: float = 0.0
    hidden: list[Hidden | None] = field(default_factory=list)


class RehearsalWorker:
    """Called with one lane after the other; weights and directions stay on the device until others are named."""

    def __init__(
        self, storage: Storage, source: ModelSource, reference: ModelSource | None, settings: Settings
    ) -> None:
        self.settings, self.reference = settings, reference
        model = held_model(source, settings)
        self.device = device_of(model)
        self.scored = checked_layers(model, settings)
        valuation = settings.valuation
        self.columns = valuation.columns
        self.model = RehearsedModel(
            self.scored, valuation.window, settings.model.attention, valuation.scores, valuation.exact
        )
        self.weights: tuple[int, dict[str, torch.Tensor]] = (-1, {})
        self.valuer: tuple[int, TokenValuer | None] = (-1, None)
        self.engine = Engine(self.scored, settings)
        self.device_lock = threading.Lock()  # two shards are in flight, one at a time uses the model

    def __call__(self, task: LaneTask, advance: Callable[[int], None]) -> LaneResult:
        """Run one lane."""
        work = {"policy": self._policy, "reference": self._reference, "values": self._values}
        with self.device_lock:
            return work.get(task.what, self._gradient)(task, advance)

    def _policy(self, task: LaneTask, advance: Callable[[int], None]) -> LaneResult:
        return LaneResult(total=_to_host(self.scored.weights()))

    def _reference(self, task: LaneTask, advance: Callable[[int], None]) -> LaneResult:
        assert self.reference is not None
        model = load_model(here(self.reference), torch.device("cpu"))
        return LaneResult(total=_to_host(checked_layers(model, self.settings).weights()))

    def _values(self, task: LaneTask, advance: Callable[[int], None]) -> LaneResult:
        weights, valuer, result = self._weights(task), self._valuer(task), LaneResult()
        for group in task.groups:
            self.engine([row.tolist() for row in group.input_ids])
            batch, hidden = self._batch(group)
            found = self._safely(group, partial(self.model.values, valuer, weights, batch, hidden))
            result.columns.append(torch.stack([found[name] for name in self.columns]).float().cpu().numpy())
            result.hidden.append(_new(group, hidden))
            advance(int(batch.lengths.sum()))
        return result

    def _gradient(self, task: LaneTask, advance: Callable[[int], None]) -> LaneResult:
        weights, total, tokens, loss = self._weights(task), OuterSum(self.scored), 0, 0.0
        found: list[Hidden | None] = []
        for group in task.groups:
            batch, hidden = self._batch(group)
            losses = self._safely(
                group,
                partial(self.model.add_gradient, total, weights, batch, hidden, task.what == "direction"),
            )
            tokens, loss = tokens + len(losses), loss + float(losses.double().sum())
            found.append(_new(group, hidden))
        return LaneResult(total=_to_host(total.total), tokens=tokens, loss=loss, hidden=found)

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

    def _weights(self, task: LaneTask) -> dict[str, torch.Tensor]:
        assert task.weights is not None
        if self.weights[0] != task.step:
            self.weights = (task.step, self._on_device(task.weights.get()))
        return self.weights[1]

    def _valuer(self, task: LaneTask) -> TokenValuer:
        assert task.directions is not None
        if self.valuer[1] is None or self.valuer[0] != task.directed:
            named = {name: self._on_device(arrays) for name, arrays in task.directions.get().items()}
            try:
                self.valuer = (task.directed, self.model.valuer(named))
            except UnsupportedModel as error:
                raise RunFailed(f"model.policy: {error}") from error
        valuer = self.valuer[1]
        assert valuer is not None
        return valuer

    def _on_device(self, arrays: Arrays) -> dict[str, torch.Tensor]:
        """Copies in the model's dtype: what comes from the object store cannot be written to."""
        dtypes = {linear.name: linear.parameter.dtype for linear in self.scored.maps}
        return {name: torch.tensor(array).to(self.device, dtypes[name]) for name, array in arrays.items()}


def _new(group: Group, hidden: list[torch.Tensor]) -> Hidden | None:
    """None where it was given, or where no pass was needed since nothing is labelled."""
    return Hidden.of(hidden[0]) if group.hidden is None and hidden else None


def _to_host(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: tensor.detach().to("cpu", torch.float32).numpy() for name, tensor in tensors.items()}

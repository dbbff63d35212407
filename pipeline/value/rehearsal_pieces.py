"""What workers do with one piece of a rehearsal's course: some whole parameters of the scored layers.

    Begin    the shapes, and the reference's weights as a file        Gradient   sum of the lanes / tokens, and its norms
    Load     masters and moments as they were before a step           Step       AdamW
    Direct   adaptation = sum of the lanes / tokens, stability = F * (W - W_ref) (Eq. 10)
    Save     all pieces as one file

Results go to the store, as arrays that are named as in the file of the state, ``<kind>/<parameter name>``; the driver gets
names, shapes and norms. All is done element by element but for the norm of a parameter, which is why none is cut: so the
numbers do not depend on the pieces or on who makes which.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from alphatoken.pipeline.anchor.places import FISHER
from alphatoken.pipeline.anchor.tensor_file import TensorFile
from alphatoken.pipeline.anchor.tensors import Shapes, carried, counts_of, tensor_stream, write_tensors
from alphatoken.pipeline.cluster.work import Lost, Shared
from alphatoken.pipeline.maths.adamw import MOMENTS, ScoredAdamW
from alphatoken.pipeline.maths.directions import NAMES, fisher_drift
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage

PLACE = "values/rehearsal"  # what is needed until values/ is complete
STATE = f"{PLACE}/state.safetensors"
REFERENCE = f"{PLACE}/reference.safetensors"  # where it is another model than the policy
MASTER = "master"

Arrays = Mapping[str, np.ndarray]
Tensors = dict[str, torch.Tensor]
Names = tuple[str, ...]  # of the parameters of one piece
Store = Callable[[Any], Shared]


@dataclass(frozen=True, slots=True)
class Own:
    """What a worker has by itself. ``weights``: the policy's scored weights. ``reference``: loads those of the reference;
    None: they are the policy's."""

    storage: Storage
    learning_rate: float
    weights: Callable[[], Tensors]
    reference: Callable[[], Tensors] | None


class PieceTask(Protocol):
    """``part``: its name in the worker's log. Raises Lost where what it needs is gone."""

    @property
    def part(self) -> str:
        """See the class."""

    def __call__(self, own: Own) -> Any:
        """Do it."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Returns the shapes of the scored weights."""

    part: str
    fingerprint: str

    def __call__(self, own: Own) -> Shapes:
        """See the class."""
        if own.reference is not None and counts_of(own.storage, REFERENCE, self.fingerprint) is None:
            write_tensors(own.storage, REFERENCE, own.reference(), carried(self.fingerprint, {}))
        return {name: tuple(weight.shape) for name, weight in own.weights().items()}


@dataclass(frozen=True, slots=True)
class Load:
    """The course before ``step``: from the model before the first one, else from the file of the state.

    Returns masters, moments (None before the first step) and, with ``directed``, directions (else None).
    """

    part: str
    names: Names
    step: int
    directed: bool
    store: Store

    def __call__(self, own: Own) -> tuple[Shared, Shared | None, Shared | None]:
        """See the class."""
        if not self.step:
            weights = own.weights()
            masters = {f"{MASTER}/{name}": on_host(weights[name]) for name in self.names}
            return stored(self.store, masters), None, None
        with TensorFile(own.storage, STATE) as file:

            def read(kinds: Sequence[str]) -> Shared:
                keys = [f"{kind}/{name}" for kind in kinds for name in self.names]
                return stored(self.store, {key: file.whole(key).numpy() for key in keys})

            return read([MASTER]), read(MOMENTS), read(NAMES) if self.directed else None


@dataclass(frozen=True, slots=True)
class Gradient:
    """The mean gradient; returns where it is and the norm of each parameter. ``lanes``: of this piece, in their order."""

    part: str
    names: Names
    lanes: Sequence[Shared]
    tokens: int
    store: Store

    def __call__(self, own: Own) -> tuple[Shared, list[float]]:
        """See the class."""
        mean = _mean(self.names, self.lanes, self.tokens)
        with _one_thread():
            norms = [float(torch.linalg.vector_norm(mean[name])) for name in self.names]
        return stored(self.store, {name: mean[name].numpy() for name in self.names}), norms


@dataclass(frozen=True, slots=True)
class Direct:
    """Both directions at the present ``masters``; ``lanes``: of the gradient on the validation set. ``weighed``: whether
    there is a Fisher; without it stability is 0."""

    part: str
    names: Names
    lanes: Sequence[Shared]
    tokens: int
    masters: Shared
    weighed: bool
    store: Store

    def __call__(self, own: Own) -> Shared:
        """Returns where they are."""
        adaptation, masters = _mean(self.names, self.lanes, self.tokens), tensors(self.masters.get())
        found = {f"{NAMES[0]}/{name}": adaptation[name].numpy() for name in self.names}
        fisher = self._whole(own, FISHER) if self.weighed else {}
        before = {} if not self.weighed else own.weights() if own.reference is None else self._whole(own, REFERENCE)
        for name in self.names:
            now = masters[f"{MASTER}/{name}"]
            drift = fisher_drift(fisher[name], now, before[name].cpu()) if self.weighed else torch.zeros_like(now)
            found[f"{NAMES[1]}/{name}"] = drift.numpy()
        return stored(self.store, found)

    def _whole(self, own: Own, place: str) -> Tensors:
        with TensorFile(own.storage, place) as file:
            return {name: file.whole(name) for name in self.names}


@dataclass(frozen=True, slots=True)
class Step:
    """AdamW after ``steps`` steps, along a part of a gradient whose whole has the norm ``norm``, at ``factor`` times the
    learning rate. ``moments``: None for the first. Returns the new masters and moments."""

    part: str
    names: Names
    gradient: Shared
    masters: Shared
    moments: Shared | None
    steps: int
    norm: float
    factor: float
    store: Store

    def __call__(self, own: Own) -> tuple[Shared, Shared]:
        """See the class."""
        state = tensors(self.masters.get())
        weights = {name: state[f"{MASTER}/{name}"] for name in self.names}
        start = None if self.moments is None else (self.steps, {**state, **tensors(self.moments.get())})
        adamw = ScoredAdamW(weights, own.learning_rate, start)
        adamw.step(tensors(self.gradient.get()), 1, self.factor, self.norm)
        found = {key: tensor.numpy() for key, tensor in adamw.state().items()}
        masters = {key: found.pop(key) for key in state}
        return stored(self.store, masters), stored(self.store, found)


@dataclass(frozen=True, slots=True)
class Save:
    """Write the state. ``kinds``: kind -> where its pieces are; ``counts``: what the file is found again with."""

    part: str
    pieces: Sequence[Names]
    kinds: Mapping[str, Sequence[Shared]]
    shapes: Shapes
    fingerprint: str
    counts: dict[str, Any]

    def __call__(self, own: Own) -> None:
        """See the class."""
        shapes = {f"{kind}/{name}": shape for kind in self.kinds for name, shape in self.shapes.items()}
        marks = carried(self.fingerprint, self.counts)
        with tensor_stream(own.storage, STATE, shapes, marks) as stream:
            for kind in sorted(self.kinds, key=lambda kind: f"{kind}/"):
                for names, piece in zip(self.pieces, self.kinds[kind], strict=True):
                    arrays = piece.get()
                    for name in names:
                        stream.put(f"{kind}/{name}", arrays[f"{kind}/{name}"])


def stored(store: Store, value: Any) -> Shared:
    """``value`` in the store. Raises RunFailed where it has no room: it would have none the next time."""
    try:
        return store(value)
    except Lost as error:
        raise RunFailed(
            f"there is no room for what a rehearsal keeps between its steps ({error}): give Ray a larger object store, or "
            "more disk to spill it to (docs/rehearsal.md says how much), and run the same command again, it goes on"
        ) from error


def tensors(arrays: Arrays) -> Tensors:
    """Not copies, and not to be written to: a parameter of a large model has a gigabyte."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what cannot be written to
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def on_host(tensor: torch.Tensor) -> np.ndarray:
    """Float32; of a float32 tensor on the host no copy."""
    return tensor.detach().to("cpu", torch.float32).numpy()


def _mean(names: Names, lanes: Sequence[Shared], tokens: int) -> Tensors:
    """The lanes' sums added in their order, over ``tokens``."""
    total: Tensors = {}
    for lane in lanes:
        for name, tensor in tensors(lane.get()).items():
            total[name] = total[name].add_(tensor) if name in total else tensor.clone()
    return {name: total[name].div_(max(1, tokens)) for name in names}


@contextmanager
def _one_thread() -> Iterator[None]:
    """A norm is a sum in as many parts as there are threads, and must not depend on how many a worker is given."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

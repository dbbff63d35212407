"""The passes of an unrolled run, shared between its worker and those that have no run of their own.

The worker of an order leads: it holds the run's state, offers the passes of each step and makes from the first on what nobody has
taken. Helpers hold the model alone; weights and directions come to them through the store, and so goes back what a pass adds,
which the lead adds in the passes' order: the same bytes however many helpers there are, or were lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alphatoken.pipeline.cluster.work import Board, Lost, Part, Shared
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.learners import Trained
from alphatoken.pipeline.maths.passes import StepWork, Visitor, alone
from alphatoken.pipeline.maths.placement import device_of
from alphatoken.pipeline.maths.second_order import Curvature

LOOK_SECONDS = 0.01  # between two looks at the board
LEAST_PATIENCE, PATIENCE = 5.0, 3.0  # seconds, and lengths of the lead's own longest pass, until it makes a pass itself
IDLE_SECONDS = 900.0  # after which a helper ends: the worker may be wanted for a lead that was lost
ALIVE_SECONDS = 5.0  # between two signs of life of a helper without work, as while losses are measured

Arrays = dict[str, np.ndarray]
log = logging.getLogger("alphatoken")


@dataclass(frozen=True, slots=True)
class _Packed:
    """StepWork for the store. ``passes``: of each (input ids, labels, lengths)."""

    weights: Arrays
    passes: list[tuple[np.ndarray, ...]]
    directions: dict[str, Arrays] | None
    kernel: str

    @classmethod
    def of(cls, work: StepWork) -> _Packed:
        several = work.directions
        return cls(
            _arrays(work.weights),
            [tuple(one.cpu().numpy() for one in (b.input_ids, b.labels, b.lengths)) for b in work.passes],
            None if several is None else {name: _arrays(one) for name, one in several.items()},
            work.kernel,
        )

    def work(self, device: torch.device) -> StepWork:
        """Copies on a device: what comes from the store cannot be written to."""
        several = self.directions
        return StepWork(
            _tensors(self.weights, device),
            [Batch(*(torch.tensor(one) for one in each)).to(device) for each in self.passes],
            None if several is None else {name: _tensors(one, device) for name, one in several.items()},
            self.kernel,
        )


@dataclass(frozen=True, slots=True)
class _Made:
    """What a helper has made of one pass; ``added``: direction -> weight -> what the pass adds."""

    losses: np.ndarray
    along: Arrays
    added: dict[str, Arrays]


class SharedPasses:
    """As ``passes.Passes``, by the lead of a board. ``helped``: how many passes others have made."""

    def __init__(self, board: Board, lead: str, store: Callable[[Any], Shared]) -> None:
        self.board, self.lead, self.store, self.helped = board, lead, store, 0
        self.longest = 0.0  # seconds of one pass of the lead's own
        self.gone = False

    def __call__(self, learner: Trained, work: StepWork, visit: Visitor) -> list[Curvature]:
        """See Passes."""
        if len(work.passes) == 1 or self.gone or not self._offered(work):
            return alone(learner, work, visit)
        found = []
        with learner.holding(work.weights):
            for number in range(len(work.passes)):
                made = None if self._mine(number) else self._delivered(number)
                if made is None:
                    started = time.monotonic()
                    found.append(work.made(learner, number, visit))
                    self.longest = max(self.longest, time.monotonic() - started)
                    continue
                self.helped += 1
                device = device_of(learner.scored.model)
                for direction, arrays in made.added.items():
                    for name, tensor in _tensors(arrays, device).items():
                        visit(direction, name, tensor)
                found.append(Curvature(torch.tensor(made.losses).to(device), _tensors(made.along, device)))
        return found

    def leave(self) -> None:
        """The run is made."""
        if not self.gone:
            try:
                self.board.leave(self.lead)
            except Lost as error:
                self._lost(error)

    def _offered(self, work: StepWork) -> bool:
        try:
            self.board.offer(self.lead, self.store(_Packed.of(work)), len(work.passes))
        except Lost as error:
            self._lost(error)
        return not self.gone

    def _mine(self, number: int) -> bool:
        try:
            return self.gone or self.board.claim(self.lead, number)
        except Lost as error:
            self._lost(error)
            return True

    def _delivered(self, number: int) -> _Made | None:
        """None where it does not come: whoever had taken it may be gone."""
        end = time.monotonic() + max(LEAST_PATIENCE, PATIENCE * self.longest)
        try:
            while (result := self.board.result(self.lead, number)) is None:
                if time.monotonic() > end:
                    log.warning("pass %d was taken by a helper and did not come: it is made again here", number)
                    return None
                time.sleep(LOOK_SECONDS)
        except Lost as error:
            self._lost(error)
            return None
        try:
            return result.get()
        except Lost as error:
            log.warning("pass %d of a helper is lost (%s): it is made again here", number, error)
            return None

    def _lost(self, error: Lost) -> None:
        self.gone = True
        log.warning("goes on without helpers: %s", error)


def help_leads(
    board: Board, learner: Trained, store: Callable[[Any], Shared], lock: Any, advance: Callable[[int], None]
) -> int:
    """Make passes of whoever offers some, until all leads have left or none has offered any for a while; returns how many.

    ``lock``: held while the model is used.
    """
    passes, held = 0, _Held(device_of(learner.scored.model))
    idle = told = time.monotonic()
    try:
        while not board.over() and time.monotonic() - idle < IDLE_SECONDS:
            with lock:  # first: while a lead of this worker's own holds it, others are to have the parts
                part = board.take()
                made = None if part is None else _made(held.work(part), part.number, learner)
            if part is not None:
                board.deliver(part, store(made))
                passes, idle = passes + 1, time.monotonic()
                advance(1)
                continue
            time.sleep(LOOK_SECONDS)
            if time.monotonic() - told > ALIVE_SECONDS:
                advance(1)
                told = time.monotonic()
    except (Lost, torch.OutOfMemoryError) as error:  # the lead makes it itself
        log.warning("helps no longer: %s", error)
    return passes


class _Held:
    """The step that a helper has on its device, until it takes part in another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of: tuple[str, int] = ("", 0)
        self._work: StepWork | None = None

    def work(self, part: Part) -> StepWork:
        """Of a part. Raises Lost."""
        if self._work is None or self.of != (part.lead, part.key):
            self._work = None  # let go of it before another comes
            self._work, self.of = part.work.get().work(self.device), (part.lead, part.key)
        return self._work


def _made(work: StepWork, number: int, learner: Trained) -> _Made:
    added: dict[str, Arrays] = {}

    def keep(direction: str, name: str, tensor: torch.Tensor) -> None:
        added.setdefault(direction, {})[name] = _array(tensor).copy()

    with learner.holding(work.weights):
        found = work.made(learner, number, keep)
    return _Made(_array(found.losses), _arrays(found.along), added)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """In at least float32, as it is added."""
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32)).numpy()


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: _array(tensor) for name, tensor in tensors.items()}


def _tensors(arrays: Arrays, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(array).to(device) for name, array in arrays.items()}

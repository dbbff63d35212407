"""The course of a rehearsal, seen from the driver: where the pieces of weights, moments and directions are.

    pieces    whole parameters, about as much together as a piece of the anchor's sums; cut from the shapes alone
    lanes     their gradients are in the store, by piece, and a piece is added up over them by whichever worker is free
    a step    the pieces' norms come to the driver, which knows the norm of the whole by them, and then go through AdamW

The driver has names, shapes, counts and norms, and no tensor. What the store has lost with a worker or a node raises Lost:
the course then has to be begun again from its last save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from alphatoken.pipeline.anchor import sums
from alphatoken.pipeline.cluster.work import Lost, Pool, Shard, Shared
from alphatoken.pipeline.maths.adamw import MOMENTS, norm_of
from alphatoken.pipeline.maths.directions import NAMES
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.progress import Task
from alphatoken.pipeline.value.rehearsal_pieces import MASTER, Begin, Direct, Gradient, Load, Names, Save, Step

Lanes = Sequence[Sequence[Shared]]  # of a sum: by lane, by piece


class InOrder:
    """Tasks of a pool whose results are taken in the tasks' order."""

    def __init__(self, pool: Pool, task: Task) -> None:
        self.pool, self.task = pool, task

    def run(
        self,
        names: Sequence[str],
        made: Callable[[int], Any],
        take: Callable[[int, Any], None],
        units: Sequence[int] = (),
    ) -> None:
        """``made(i)`` is called when the task ``names[i]`` is handed out, ``take(i, result)`` as soon as those before it are
        taken. Raises Lost where one needed what is gone, when those at work have ended; the others are not begun."""
        waiting: dict[int, Any] = {}
        numbers = {name: number for number, name in enumerate(names)}
        following = 0
        lost: list[Lost] = []

        def done(shard: Shard, result: Any) -> None:
            nonlocal following
            if isinstance(result, Lost):
                lost.append(result)
            if lost:
                return
            waiting[numbers[shard.name]] = result
            while following in waiting:
                take(following, waiting.pop(following))
                following += 1

        shards = [Shard(name, units[number] if units else 0) for name, number in numbers.items()]
        self.pool.run(shards, lambda shard: None if lost else made(numbers[shard.name]), done, self.task)
        if lost:
            raise lost[0]


class Course:
    """From ``begin`` on. ``weighed``: whether stability has a Fisher."""

    def __init__(self, pool: Pool, task: Task, fingerprint: str, weighed: bool) -> None:
        self.store, self.fingerprint, self.weighed = pool.store, fingerprint, weighed
        self.in_order = InOrder(pool, task)
        self.pieces: list[Names] = []
        self.masters: list[Shared] = []
        self.moments: list[Shared | None] = []
        self.directions: list[Shared] = []

    def begin(self, step: int, directed: bool) -> None:
        """Take up the course before ``step``: 0, or the one that the file of the state was written before. ``directed``:
        whether that has the directions as well."""
        found: list[Any] = []
        self.in_order.run(
            ["scored weights"], lambda i: Begin("scored weights", self.fingerprint), lambda i, r: found.append(r)
        )
        (self.shapes,) = found
        cut = sums.pieces_of(self.shapes, sums.PIECE_BYTES, whole=True)
        self.pieces = [tuple(one.name for one in piece) for piece in cut]

        def take(number: int, result: tuple[Shared, Shared | None, Shared | None]) -> None:
            masters, moments, directions = result
            self.masters.append(masters)
            self.moments.append(moments)
            if directions is not None:
                self.directions.append(directions)

        self._pieces(step, "load", lambda part, i: Load(part, self.pieces[i], step, directed, self.store), take)

    def direct(self, step: int, lanes: Lanes, tokens: int) -> None:
        """Make the directions at the present weights from the validation set's summed gradient."""
        self.directions = []  # the store lets go of those before

        def made(part: str, i: int) -> Direct:
            own = [lane[i] for lane in lanes]
            return Direct(part, self.pieces[i], own, tokens, self.masters[i], self.weighed, self.store)

        self._pieces(step, "direct", made, lambda i, result: self.directions.append(result))

    def mean(self, step: int, lanes: Lanes, tokens: int) -> tuple[list[Shared], float]:
        """The summed gradient over ``tokens``, by piece, and its norm. Raises RunFailed where that is not finite."""
        gradients: list[Shared] = []
        norms: list[float] = []

        def add(number: int, result: tuple[Shared, list[float]]) -> None:
            gradients.append(result[0])
            norms.extend(result[1])

        def summed(part: str, i: int) -> Gradient:
            return Gradient(part, self.pieces[i], [lane[i] for lane in lanes], tokens, self.store)

        self._pieces(step, "add up", summed, add)
        norm = norm_of(norms)
        if not math.isfinite(norm):
            raise RunFailed(
                f"the gradient of step {step} is not finite: set a smaller valuation.rehearsal.learning_rate"
            )
        return gradients, norm

    def move(self, step: int, gradient: Sequence[Shared], norm: float, factor: float) -> None:
        """One step of AdamW along the mean gradient, at ``factor`` times the learning rate."""

        def stepped(part: str, i: int) -> Step:
            own = (gradient[i], self.masters[i], self.moments[i])
            return Step(part, self.pieces[i], *own, step, norm, factor, self.store)

        def take(number: int, result: tuple[Shared, Shared]) -> None:
            self.masters[number], self.moments[number] = result

        self._pieces(step, "move", stepped, take)

    def save(self, step: int, directed: bool, counts: dict[str, Any]) -> None:
        """Write the state before ``step``, which is found again with ``counts``."""
        moments = [piece for piece in self.moments if piece is not None]  # a step has been made: all of them
        kinds = {MASTER: self.masters, **dict.fromkeys(MOMENTS, moments)}
        if directed:
            kinds |= dict.fromkeys(NAMES, self.directions)
        part = f"step {step} save"
        save = Save(part, self.pieces, kinds, self.shapes, self.fingerprint, counts)
        self.in_order.run([part], lambda i: save, lambda i, result: None)

    def _pieces(self, step: int, what: str, made: Callable[[str, int], Any], take: Callable[[int, Any], None]) -> None:
        parts = [f"step {step} {what} {number}" for number in range(len(self.pieces))]
        self.in_order.run(parts, lambda number: made(parts[number], number), take)

"""The tape of a simulated run on disk: every step's weights and step sizes in bfloat16, within a bound.

What is kept of the weights is how far they have moved, since a step is smaller than bfloat16's rounding of a weight. Where
all steps are more than the bound, every s-th state of the run is kept in float32 and the steps between are made again: the
numbers are the same, whatever the bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from alphatoken.pipeline.anchor.places import PARTIAL
from alphatoken.pipeline.anchor.tensors import carried, counts_of, read_tensors, write_tensors
from alphatoken.pipeline.maths.simulated import Taped, Tensors
from alphatoken.pipeline.run.storage import Storage

STEP_BYTES = 4  # per weight that learns: how far it has moved, and its step size
STATE_BYTES = 12  # per weight that learns: the weight and Adam's two moments


def tape_bytes(steps: int, every: int, weights: int) -> int:
    """Bytes on disk of a run of ``steps`` steps over ``weights`` weights that learn of which every ``every``-th is kept."""
    if every == 1:
        return steps * STEP_BYTES * weights
    states = -(-steps // every) - 1  # the first is the model's own
    return (states * STATE_BYTES + every * STEP_BYTES) * weights


def kept_every(steps: int, weights: int, bound: int) -> int | None:
    """The smallest s with which the tape fits ``bound`` bytes; None: no s does."""
    return next((every for every in range(1, steps + 1) if tape_bytes(steps, every, weights) <= bound), None)


def least_bytes(steps: int, weights: int) -> int:
    """The smallest bound that is enough."""
    return min(tape_bytes(steps, every, weights) for every in range(1, steps + 1))


def too_long(steps: int, weights: int, bound: int) -> str:
    """What to say where no s fits."""
    return (
        f"anchor.unroll.tape_bytes={bound}: a run of {steps} steps of {weights:,} weights needs at least "
        f"{least_bytes(steps, weights)}; or give fewer anchor.unroll.steps"
    )


class Tape:
    """Of one run. ``start``: W_0 in float32. ``every``: see the module. ``again(first, stop)``: makes these steps again
    from the state before ``first`` and puts them here."""

    def __init__(
        self,
        storage: Storage,
        order: int,
        fingerprint: str,
        start: Tensors,
        steps: int,
        every: int,
        again: Callable[[int, int], None],
    ) -> None:
        self.storage, self.fingerprint, self.start = storage, fingerprint, start
        self.steps, self.every, self.again = steps, every, again
        self.place = f"{PARTIAL}/tape-{order:02d}"

    def name(self, step: int) -> str:
        """Of the file of a step."""
        return f"{self.place}/step-{step:05d}.safetensors"

    def state_name(self, step: int) -> str:
        """Of the file of the run's whole state before a step."""
        return f"{self.place}/state-{step:05d}.safetensors"

    def state_before(self, step: int) -> int:
        """The last step up to ``step`` before which the whole state is there; 0 is the model's own. An earlier one than that of
        ``every`` where the run was begun with another bound."""
        there = (
            at
            for at in range(step, 0, -1)
            if counts_of(self.storage, self.state_name(at), self.fingerprint) is not None
        )
        return next(there, 0)

    def put(self, step: int, taped: Taped) -> None:
        """Keep a step of an Adam run."""
        assert isinstance(taped.scale, dict)
        tensors = {f"moved/{name}": weight - self.start[name] for name, weight in taped.weights.items()}
        tensors |= {f"scale/{name}": scale for name, scale in taped.scale.items()}
        facts = {"clip": taped.clip, "tokens": taped.tokens}
        write_tensors(self.storage, self.name(step), tensors, carried(self.fingerprint, facts), torch.bfloat16)

    def __call__(self, step: int) -> Taped:
        """The step as it was kept; what is above its part of the run is taken away where steps are made again."""
        facts = counts_of(self.storage, self.name(step), self.fingerprint)
        if facts is None:
            first = step // self.every * self.every
            if self.every > 1:
                for later in range(first + self.every, min(self.steps, first + 2 * self.every)):
                    self.storage.remove(self.name(later))
            self.again(first, step + 1)
            facts = counts_of(self.storage, self.name(step), self.fingerprint)
            assert facts is not None, json.dumps({"step": step, "every": self.every})
        found = read_tensors(self.storage, self.name(step))
        weights = {name: start + found[f"moved/{name}"].to(start) for name, start in self.start.items()}
        scale = {name: found[f"scale/{name}"].to(start.device) for name, start in self.start.items()}  # as it was kept
        return Taped(weights, scale, facts["clip"], facts["tokens"])

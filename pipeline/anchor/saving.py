"""The state of a long task in one file, so that a killed one goes on from there to the same numbers."""

from __future__ import annotations

import time

import torch

from alphatoken.pipeline.anchor.tensors import carried, counts_of, read_tensors, write_tensors
from alphatoken.pipeline.run.storage import Storage


class Saving:
    """Keeps the state of a task that goes by steps in one file, as often as a tenth of its time allows."""

    def __init__(self, storage: Storage, name: str, fingerprint: str) -> None:
        self.storage, self.name, self.fingerprint = storage, name, fingerprint
        self.ready_at = 0.0

    def last_state(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The step and the state of the interrupted task; None to start from the beginning."""
        counts = counts_of(self.storage, self.name, self.fingerprint)
        return (counts["steps"], read_tensors(self.storage, self.name)) if counts else None

    def __call__(self, steps: int, state: dict[str, torch.Tensor], last: bool = False) -> None:
        """Save, unless the last time is too short ago for what a save costs; ``last``: in any case."""
        started = time.monotonic()
        if last or started >= self.ready_at:
            write_tensors(self.storage, self.name, state, carried(self.fingerprint, {"steps": steps}))
            now = time.monotonic()
            self.ready_at = now + 9 * (now - started)

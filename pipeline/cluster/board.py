"""A board on which some workers offer the parts of what they do, and others take them.

A lead offers numbered parts and takes them from the front; helpers take from the back, of the lead that has most of them left. A
lead that comes to a part which a helper has not delivered in time makes it itself, so that nobody depends on a helper. Values go
through the store: the board has their names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from alphatoken.pipeline.cluster.work import Lost, Part, Shared
from alphatoken.pipeline.run.failure import first_line

SECONDS = 60.0  # for an answer


@dataclass(slots=True)
class _Offer:
    key: int
    work: Shared
    free: list[int]  # ascending
    results: dict[int, Shared] = field(default_factory=dict)


@ray.remote(num_cpus=0, max_restarts=0)
class _Board:
    def __init__(self, leads: Sequence[str]) -> None:
        self.working = set(leads)
        self.offers: dict[str, _Offer] = {}
        self.keys = 0

    def offer(self, lead: str, work: Shared, count: int) -> None:
        self.keys += 1
        self.offers[lead] = _Offer(self.keys, work, list(range(count)))

    def claim(self, lead: str, number: int) -> bool:
        offer = self.offers[lead]
        if number not in offer.free:
            return False
        offer.free.remove(number)
        return True

    def take(self) -> Part | None:
        most = max(self.offers.items(), key=lambda item: len(item[1].free), default=None)
        if most is None or not most[1].free:
            return None
        lead, offer = most
        return Part(lead, offer.key, offer.free.pop(), offer.work)

    def over(self) -> bool:
        return not self.working

    def deliver(self, part: Part, result: Shared) -> None:
        offer = self.offers.get(part.lead)
        if offer is not None and offer.key == part.key:  # else the lead has made it itself and gone on
            offer.results[part.number] = result

    def result(self, lead: str, number: int) -> Shared | None:
        return self.offers[lead].results.get(number)

    def leave(self, lead: str) -> None:
        self.offers.pop(lead, None)
        self.working.discard(lead)


class RayBoard:
    """As ``work.Board``, in a process of its own, until the pool that has made it ends."""

    def __init__(self, leads: Sequence[str]) -> None:
        self.actor = _Board.remote(list(leads))  # type: ignore[attr-defined]  # ray.remote makes it

    def offer(self, lead: str, work: Shared, count: int) -> None:
        """See work.Board."""
        self._asked(self.actor.offer.remote, lead, work, count)

    def claim(self, lead: str, number: int) -> bool:
        """See work.Board."""
        return bool(self._asked(self.actor.claim.remote, lead, number))

    def take(self) -> Part | None:
        """See work.Board."""
        return self._asked(self.actor.take.remote)

    def over(self) -> bool:
        """See work.Board."""
        return bool(self._asked(self.actor.over.remote))

    def deliver(self, part: Part, result: Shared) -> None:
        """See work.Board."""
        self._asked(self.actor.deliver.remote, part, result)

    def result(self, lead: str, number: int) -> Shared | None:
        """See work.Board."""
        return self._asked(self.actor.result.remote, lead, number)

    def leave(self, lead: str) -> None:
        """See work.Board."""
        self._asked(self.actor.leave.remote, lead)

    @staticmethod
    def _asked(question: Callable[..., Any], *given: Any) -> Any:
        try:
            return ray.get(question(*given), timeout=SECONDS)
        except RayError as error:
            raise Lost(f"the board does not answer: {first_line(error)}") from error

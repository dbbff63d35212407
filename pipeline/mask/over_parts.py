"""Going over the parts of a run, all masks together: in this process, or by the workers of a pool, some parts to each.

What comes back from each worker adds up to the same in any order, and every part is written by one worker, so that the
bytes are the same for any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from alphatoken.pipeline.cluster.work import Shard
from alphatoken.pipeline.mask.looks import Look
from alphatoken.pipeline.mask.paired_rows import PairedParts
from alphatoken.pipeline.mask.pairs import write_pairs_part
from alphatoken.pipeline.mask.supervised import write_supervised_part
from alphatoken.pipeline.mask.worker import Tally, Written
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.storage import Storage

ROWS_PER_TASK = 65_536  # for a worker at once: parts are added up to about so many


class Work(Protocol):
    """What is done with some parts; ``result`` is what ``do`` returns."""

    def do(
        self, storage: Storage, sources: Mapping[str, PairedParts], parts: Sequence[str],
        advance: Callable[[int], None], threads: int,
    ) -> Any:  # fmt: skip
        """Do it, and return what was counted."""

    def take(self, result: Any) -> None:
        """Add up what was counted."""


class Counting:
    """One pass: ``looks`` of any masks; of those that find the same one is shown the rows."""

    def __init__(self, looks: Sequence[Look]) -> None:
        self.groups: list[list[Look]] = []
        known: dict[Any, list[Look]] = {}
        for look in looks:
            group = known.setdefault(look.key, []) if look.key is not None else []
            if not group:
                self.groups.append(group)
            group.append(look)

    def do(
        self, storage: Storage, sources: Mapping[str, PairedParts], parts: Sequence[str],
        advance: Callable[[int], None], threads: int,
    ) -> list[Any]:  # fmt: skip
        """Returns what the first look of each group has counted."""
        looks = [group[0].blank() for group in self.groups]
        for branch, source in sources.items():
            own = [look for look in looks if look.branch == branch]
            columns = tuple(dict.fromkeys(name for look in own for name in look.columns))
            for part in parts:
                for rows in source.part(part, columns, with_input_ids=False) if own else ():
                    for look in own:
                        look.at(rows)
                    advance(len(rows))
        return [look.reader.counted() for look in looks]

    def take(self, result: list[Any]) -> None:
        """Give every look what the first of its group has counted."""
        for group, counted in zip(self.groups, result, strict=True):
            for look in group:
                look.reader.add(counted)


class Writing:
    """Deciding, counting and writing ``masks``. ``columns``: to read, by branch; ``reference``: of pairs, the fingerprint of it."""

    def __init__(self, masks: Sequence[Written], columns: Mapping[str, tuple[str, ...]], reference: str | None) -> None:
        self.masks, self.columns, self.reference = tuple(masks), dict(columns), reference
        self.tallies: list[dict[str, Tally]] = self._none()

    def _none(self) -> list[dict[str, Tally]]:
        return [{branch: Tally() for branch in mask.deciders} for mask in self.masks]

    def do(
        self, storage: Storage, sources: Mapping[str, PairedParts], parts: Sequence[str],
        advance: Callable[[int], None], threads: int,
    ) -> list[dict[str, Tally]]:  # fmt: skip
        """Returns what was decided, by mask and branch."""
        tallies = self._none()
        for part in parts:
            if self.reference is not None:
                write_pairs_part(storage, sources, part, self.masks, self.columns, self.reference, tallies, advance)
            else:
                own = [tally[""] for tally in tallies]
                write_supervised_part(storage, sources[""], part, self.masks, self.columns[""], own, advance, threads)
        return tallies

    def take(self, result: list[dict[str, Tally]]) -> None:
        """Add up."""
        for own, theirs in zip(self.tallies, result, strict=True):
            for branch, tally in theirs.items():
                own[branch].merge(tally)


@dataclass(frozen=True, slots=True)
class PartsTask:
    """Some parts for a worker. ``work``: a Shared of cluster/work.py."""

    part: str  # the first of them, for logs
    parts: tuple[str, ...]
    work: Any


class MaskWorker:
    """Does what it is handed with some parts; no model."""

    def __init__(self, storage: Storage, sources: Mapping[str, PairedParts]) -> None:
        self.storage, self.sources = storage, sources

    def __call__(self, task: PartsTask, advance: Callable[[int], None]) -> Any:
        """What was counted."""
        return task.work.get().do(self.storage, self.sources, task.parts, advance, threads=1)


@dataclass(frozen=True, slots=True)
class OverParts:
    """``sources``: by branch, of the same parts. ``pool``: of workers, or None for this process, with so many ``threads``."""

    storage: Storage
    sources: Mapping[str, PairedParts]
    progress: Progress
    threads: int
    pool: Any = None

    def go(self, title: str, work: Work, branches: int) -> None:
        """Do ``work`` with every part once. ``branches``: how often each row is read."""
        rows = next(iter(self.sources.values())).rows
        with self.progress.task(title, branches * sum(rows.values()), "rows") as task:
            if self.pool is None:
                work.take(work.do(self.storage, self.sources, tuple(rows), task.advance, self.threads))
                return
            several = {group[0]: group for group in grouped(rows, ROWS_PER_TASK)}
            shared = self.pool.store(work)
            self.pool.run(
                [Shard(name, branches * sum(rows[part] for part in group)) for name, group in several.items()],
                lambda shard: PartsTask(shard.name, several[shard.name], shared),
                lambda shard, result: work.take(result),
                task,
            )


def grouped(rows: Mapping[str, int], most: int) -> list[tuple[str, ...]]:
    """Consecutive parts, as many together as have ``most`` rows; the cut depends on the parts alone."""
    groups: list[tuple[str, ...]] = []
    held: list[str] = []
    total = 0
    for part, count in rows.items():
        if held and total + count > most:
            groups.append(tuple(held))
            held, total = [], 0
        held.append(part)
        total += count
    return [*groups, tuple(held)] if held else groups

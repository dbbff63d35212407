"""Sums of the anchor stage, seen from the driver: who makes which part, who adds up which piece, and who writes the file.

    parts     of a fixed partition of the examples, each by one worker, which adds up its examples in order, and one file
    pieces    some rows of a parameter over all parts, each by one worker, up a tree (sums.py); kept in Ray's object store
    a file    the pieces in their order, divided as the file is to have them, by one worker

The driver has names, shapes and counts, and no tensor. The parts' files are what a killed run goes on from. What is lost with
a worker or a node before the file is written is added up again from them. One worker alone, and cluster.address=inline, adds
up while it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alphatoken.pipeline.anchor.places import PARTIAL
from alphatoken.pipeline.anchor.sums import AddTask, SumFile, WriteTask
from alphatoken.pipeline.anchor.tensor_file import TensorFile
from alphatoken.pipeline.anchor.tensors import Shapes, counts_of
from alphatoken.pipeline.anchor.worker import AnchorTask
from alphatoken.pipeline.cluster.work import Pool, Shard, Shared
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.run.run import Run

SUMS = 8  # the Fisher and the validation gradient are each summed in at most this many parts


def parts_of(examples: int) -> int:
    """How many parts a sum over ``examples`` has."""
    return min(SUMS, max(1, -(-examples // 8)))


@dataclass(frozen=True, slots=True)
class Parts:
    """What a sum consists of. ``counts``: over all of it. ``shapes``: of its tensors."""

    files: tuple[str, ...]
    counts: dict[str, Any]
    shapes: Shapes


class Sums:
    """The sums that one pool makes for one run of the stage."""

    def __init__(self, run: Run, pool: Pool, fingerprint: str) -> None:
        self.run, self.pool, self.fingerprint = run, pool, fingerprint
        self.storage, self.progress = run.storage, run.progress

    def parts(self, what: str, sequences: Sequences, weights: str | None, title: str, unit: str) -> Parts:
        """Make the parts of a sum that are not there yet."""
        parts = parts_of(len(sequences.ids))
        names = [f"{PARTIAL}/{what}-{index:05d}-of-{parts:05d}.safetensors" for index in range(parts)]
        kind, seed = what.split("-")[0], self.run.settings.run.seed
        tasks = {
            f"{what} part {i}": AnchorTask(
                kind, names[i], sequences.part(i, parts), seed * 1000 + i, weights, fingerprint=self.fingerprint
            )
            for i in range(parts)
        }
        results: dict[str, dict[str, Any]] = {}
        shards = [Shard(name, len(task.sequences.ids)) for name, task in tasks.items()]
        for shard, name in zip(shards, names, strict=True):
            if (found := counts_of(self.storage, name, self.fingerprint)) is not None:
                results[shard.name] = found
        missing = [shard for shard in shards if shard.name not in results]
        if len(missing) < len(shards):
            self.progress.say(f"{title}: {len(shards) - len(missing)} of {len(shards)} parts are complete already")
        with self.progress.task(title, sum(shard.units for shard in missing), unit) as task:
            self.pool.run(missing, lambda s: tasks[s.name], lambda s, r: results.__setitem__(s.name, r), task)
        counts: dict[str, Any] = {}
        for shard in shards:
            for key, value in results[shard.name].items():
                counts[key] = counts.get(key, 0) + value
        with TensorFile(self.storage, names[0]) as file:
            shapes = file.shapes
        return Parts(tuple(names), counts, shapes)

    def write(self, file: SumFile, title: str) -> None:
        """Add up and write one file."""
        pieces, kept = file.pieces(), dict[int, Shared]()
        without_room = 0

        def keep(shard: Shard, result: Shared | None) -> None:
            nonlocal without_room
            if result is None:
                without_room += 1
            else:
                kept[numbers[shard.name]] = result

        store = self.pool.store if self.pool.workers > 1 and len(pieces) > 1 else None
        with self.progress.task(title, len(pieces) * (1 if store is None else 2), "pieces") as task:
            if store is not None:
                adds = {f"{file.output} piece {n}": AddTask(file, piece, store) for n, piece in enumerate(pieces)}
                numbers = {name: number for number, name in enumerate(adds)}
                self.pool.run([Shard(name, 1) for name in adds], lambda s: adds[s.name], keep, task)
            again: list[int] = []
            shard = Shard(file.output, len(pieces))
            self.pool.run([shard], lambda s: WriteTask(file, kept), lambda s, r: again.append(r), task)
        if without_room:
            self.progress.say(
                f"{title}: Ray's object store had no room for {without_room} of {len(pieces)} pieces, one worker added them up"
            )
        if sum(again):
            self.progress.say(
                f"{title}: {sum(again)} of {len(pieces)} pieces were lost with a worker and added up again"
            )

    def remove(self, files: Sequence[str]) -> None:
        """Remove the files of parts whose sum is written: they take as much of the disk as all parts together."""
        for name in files:
            self.storage.remove(name)

"""value with valuation.schedule=rehearsal: the paper's closed loop over the data, on the scored modules alone.

The driver holds the course: masters and moments of the scored weights, the directions, and the values so far. Workers
hold the model and nothing of the course: for each step they get the weights through Ray's object store and give back
values, then sums of gradients, lane by lane. So a lost worker costs its lanes, and a lost driver the steps since the
last save under values/rehearsal/, which is removed when values/ is complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from alphatoken.data_schemas import COMPONENTS
from alphatoken.pipeline.anchor.places import FISHER
from alphatoken.pipeline.anchor.tensors import carried, counts_of, read_tensors, write_tensors
from alphatoken.pipeline.cluster.token_batches import CPU_TOKENS
from alphatoken.pipeline.cluster.work import Pool, Shard, Shared
from alphatoken.pipeline.cluster.worker_log import logged
from alphatoken.pipeline.maths.adamw import ScoredAdamW
from alphatoken.pipeline.maths.directions import fisher_drift
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.rehearsal import kept_in_batch, lanes_of, without_masked
from alphatoken.pipeline.maths.warmup import schedule
from alphatoken.pipeline.prepare.reader import prepared_rows
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.fingerprint import of_model
from alphatoken.pipeline.run.progress import Task
from alphatoken.pipeline.run.remedies import anew
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.run import NO_PAIRS
from alphatoken.pipeline.value.inputs import checked_anchor, value_inputs
from alphatoken.pipeline.value.rehearsal_rows import RehearsedRows
from alphatoken.pipeline.value.rehearsal_worker import Group, LaneResult, LaneTask, RehearsalWorker

PLACE = "values/rehearsal"  # what is needed until values/ is complete
STATE = f"{PLACE}/state.safetensors"
STABILITY = "valuation.rehearsal.stability_weight"


def rehearse(run: Run) -> None:
    """Write values/ with the column ``kept``, unless done already. Raises SettingsWrong and RunFailed."""
    started, storage, models, own = time.monotonic(), run.storage, run.models, run.settings.model
    if run.manifest.pairs:
        raise SettingsWrong([NO_PAIRS])
    anchor, valuation = checked_anchor(run), run.settings.valuation
    weighed = valuation.rehearsal.stability_weight > 0
    if weighed and "fisher" not in anchor["counts"]:
        raise SettingsWrong(
            [f"{STABILITY} needs a Fisher, which the anchors were made without: make others, "
             f"{anew(run.storage.root, 'anchor', f'{STABILITY}={valuation.rehearsal.stability_weight} ')}, or set {STABILITY}=0"]
        )  # fmt: skip
    prepared = run.manifest.stage("prepare")["fingerprint"]
    inputs = value_inputs(run.settings, models, prepared, anchor["fingerprint"], pairs=False)
    configuration = {"model": own, "valuation": valuation, "cluster": run.settings.cluster}
    fingerprint = run.manifest.begin("value", inputs, configuration, run.models.about())
    rows = prepared_rows(run)
    whole = all(storage.rows_of(f"values/{part}", fingerprint) == count for part, count in rows.items())
    if run.manifest.done("value") and whole:
        storage.remove(PLACE)  # where the run was killed before it came to that
        run.progress.say("value: done already")
        return
    source = ModelSource(models.policy, own.revision, own.dtype, own.trust_remote_code)
    apart = weighed and of_model(models.policy) != of_model(models.reference)
    arguments = {
        "storage": storage, "source": source, "settings": run.settings,
        "reference": replace(source, path=models.reference) if apart else None,
    }  # fmt: skip
    resources = run.cluster.model_resources()
    data = RehearsedRows(storage, list(rows), run.settings)
    with (
        run.cluster.pool(logged("value", RehearsalWorker), arguments, resources) as pool,
        run.progress.task("value: rehearsal", data.tokens, "tokens") as task,
        _one_thread(),
    ):
        counts = _Rehearsal(storage, run.settings, fingerprint, data, pool, task).run()
    data.write(storage, fingerprint)
    seconds = time.monotonic() - started
    run.manifest.finish(
        "value", seconds, rows=data.rows, tokens=data.tokens, workers=resources.workers,
        cpus_per_worker=resources.cpus, gpus_per_worker=resources.gpus, **counts,
    )  # fmt: skip
    storage.remove(PLACE)
    first, last = counts["rehearsal"]["validation_loss"]
    run.progress.say(
        f"value: rehearsed {data.tokens:,} tokens in {data.steps:,} steps and {seconds:.0f} s; validation loss "
        f"{first:.4f} nats at the first refresh, {last:.4f} at the last"
    )


class _Rehearsal:
    """One course over the data, from its beginning or from the last save."""

    def __init__(
        self, storage: Storage, settings: Settings, fingerprint: str, data: RehearsedRows, pool: Pool, task: Task
    ) -> None:
        self.storage, self.own, self.fingerprint = storage, settings.valuation.rehearsal, fingerprint
        self.data, self.pool, self.task = data, pool, task
        budget = settings.valuation.tokens_per_batch
        # Not from the device's memory, which may differ from one start to the next.
        self.budget = budget if isinstance(budget, int) else CPU_TOKENS
        self.validation = data.validation_groups(self.budget)
        self.losses: list[float] = []  # on the validation set, at every refresh
        self.directions: dict[str, dict[str, torch.Tensor]] = {}
        self.directed = -1
        self.shared_directions: Shared | None = None

    def run(self) -> dict[str, Any]:
        """Go through all steps; returns what the manifest records."""
        first = self._start()
        for step in range(first, self.data.steps):
            self.task.note(f"step {step + 1}/{self.data.steps}")
            self._step(step)
            if (step + 1) % self.own.save_every == 0 and step + 1 < self.data.steps:
                self._save(step + 1)
        padded = sum(
            len(group) * max(len(self.data.input_ids(row)) for row in group)
            for step in range(self.data.steps)
            for lane in self._lanes(step)
            for group in lane
        )
        return {
            "padded_tokens": padded,
            "padding": round(1 - self.data.tokens / padded, 4) if padded else 0.0,
            "rehearsal": {
                "steps": self.data.steps,
                "kept_tokens": self.data.kept_tokens(),
                "validation_loss": [self.losses[0], self.losses[-1]],
            },
        }

    def _start(self) -> int:
        """The step to begin with; weights and moments are as before it."""
        policy = self._weights_of("policy")
        self.reference = self._weights_of("reference") if self.pool.arguments["reference"] else policy
        weighed = self.own.stability_weight > 0
        self.fisher = read_tensors(self.storage, FISHER) if weighed else {}
        saved = counts_of(self.storage, STATE, self.fingerprint)
        if saved is None or not self.data.read(self.storage, PLACE, saved["saves"], self.fingerprint):
            self.adamw, self.saves = ScoredAdamW(policy, self.own.learning_rate), [0]
            return 0
        step, state = saved["saves"][-1], read_tensors(self.storage, STATE)
        self.adamw = ScoredAdamW(policy, self.own.learning_rate, (step, state))
        self.saves, self.losses = saved["saves"], saved["losses"]
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            if kind in ("adaptation", "stability"):
                self.directions.setdefault(kind, {})[name] = tensor
        if self.directions:
            self._share_directions(step)
        self.task.advance(sum(len(self.data.input_ids(row)) for s in range(step) for row in self.data.batch(s)))
        self.task.progress.say(f"value: the rehearsal goes on from step {step} of {self.data.steps}")
        return step

    def _weights_of(self, model: str) -> dict[str, torch.Tensor]:
        """Scored weights in the order of their names, in which they are added up as well."""
        found: list[LaneResult] = []
        self._each([LaneTask(model, model)], [0], found.append)
        return _tensors(found[0])

    def _step(self, step: int) -> None:
        """Value, threshold within the batch, masked step."""
        data, own = self.data, self.own
        weights = self.pool.share({name: master.numpy() for name, master in self.adamw.masters().items()})
        if step % own.refresh == 0:
            self._refresh(step, weights)
        rows_of = self._lanes(step)
        lanes = [[data.group(rows) for rows in lane] for lane in rows_of]
        base = LaneTask("values", step=step, weights=weights, directed=self.directed, directions=self.shared_directions)
        valued = iter(zip(lanes, rows_of, strict=True))

        def put(result: LaneResult) -> None:
            lane, some = next(valued)
            for index, (rows, columns) in enumerate(zip(some, result.columns, strict=True)):
                for place, row in enumerate(rows):
                    data.put(row, columns[:, place])
                hidden = result.hidden[index]
                lane[index] = replace(lane[index], hidden=None if hidden is None else self.pool.share(hidden))

        units = [sum(len(ids) for group in lane for ids in group.input_ids) for lane in lanes]
        self._each(_tasks(base, lanes), units, put)
        self._decide(data.batch(step))
        if step + 1 == data.steps:
            return  # no value would see the weights
        masked = [
            [replace(group, labels=[without_masked(data.labels(row), data.kept(row)) for row in rows])
             for group, rows in zip(groups, some, strict=True)]
            for groups, some in zip(lanes, rows_of, strict=True)
        ]  # fmt: skip
        total, tokens, _ = self._summed(LaneTask("gradient", step=step, weights=weights), masked)
        norm = self.adamw.step(total, tokens, schedule(step, data.steps))
        if not np.isfinite(norm):
            raise RunFailed(
                f"the gradient of step {step} is not finite: set a smaller valuation.rehearsal.learning_rate"
            )

    def _decide(self, batch: Sequence[int]) -> None:
        """The threshold among the response tokens of one batch."""
        response = [self.data.response(row) for row in batch]
        components = {
            name: np.concatenate([self.data.column(name, row)[r] for row, r in zip(batch, response, strict=True)])
            for name in COMPONENTS
        }
        kept, start = kept_in_batch(components, self.own.rho, self.own.stability_weight), 0
        for row, inside in zip(batch, response, strict=True):
            stop = start + int(inside.sum())
            self.data.kept(row)[inside] = kept[start:stop]
            start = stop

    def _refresh(self, step: int, weights: Shared) -> None:
        """Both directions at the present weights; the validation set's lower layers run for the first of them alone."""
        hidden: list[Any] = []
        task = LaneTask("direction", step=step, weights=weights)
        total, tokens, loss = self._summed(task, self.validation, hidden)
        if not tokens:
            raise RunFailed("the validation set has no response token: give other rows with data.validation")
        found = iter(hidden)
        self.validation = [
            [group if (new := next(found)) is None else replace(group, hidden=self.pool.share(new)) for group in lane]
            for lane in self.validation
        ]
        now = self.adamw.masters()
        self.directions = {"adaptation": {name: tensor / tokens for name, tensor in total.items()}}
        self.directions["stability"] = {
            name: fisher_drift(self.fisher[name], now[name], self.reference[name]) if self.fisher else torch.zeros_like(w)
            for name, w in now.items()
        }  # fmt: skip
        self.losses.append(loss / tokens)
        self._share_directions(step)

    def _share_directions(self, step: int) -> None:
        named = {kind: {name: t.numpy() for name, t in some.items()} for kind, some in self.directions.items()}
        self.directed, self.shared_directions = step, self.pool.share(named)

    def _lanes(self, step: int) -> list[list[list[int]]]:
        """Row numbers of the step's groups, by lane."""
        batch = self.data.batch(step)
        lanes = lanes_of([len(self.data.input_ids(row)) for row in batch], self.budget)
        return [[[batch[i] for i in group] for group in lane] for lane in lanes]

    def _summed(
        self, base: LaneTask, lanes: Sequence[Sequence[Group]], hidden: list[Any] | None = None
    ) -> tuple[dict[str, torch.Tensor], int, float]:
        """The gradient over the lanes, added in their order; tokens and loss. ``hidden``: is given that of each group."""
        total: dict[str, torch.Tensor] = {}
        counts: list[tuple[int, float]] = []

        def add(result: LaneResult) -> None:
            for name, tensor in _tensors(result).items():
                total[name] = total[name].add_(tensor) if name in total else tensor
            counts.append((result.tokens, result.loss))
            if hidden is not None:
                hidden.extend(result.hidden)

        self._each(_tasks(base, lanes), [0] * len(lanes), add)
        return total, sum(tokens for tokens, _ in counts), sum(loss for _, loss in counts)

    def _each(self, tasks: Sequence[LaneTask], units: Sequence[int], take: Callable[[LaneResult], None]) -> None:
        """Run lanes; ``take`` gets each result as soon as it is that of the next lane."""
        waiting: dict[str, LaneResult] = {}
        names = [task.part for task in tasks]
        following = iter(names)
        expected: str | None = next(following)

        def done(shard: Shard, result: LaneResult) -> None:
            nonlocal expected
            waiting[shard.name] = result
            while expected in waiting:
                take(waiting.pop(expected))
                expected = next(following, None)

        of_name = dict(zip(names, tasks, strict=True))
        shards = [Shard(name, size) for name, size in zip(names, units, strict=True)]
        self.pool.run(shards, lambda shard: of_name[shard.name], done, self.task)

    def _save(self, step: int) -> None:
        """The values since the last save, then the state, which names all saves."""
        self.data.save(self.storage, PLACE, (self.saves[-1], step), self.fingerprint)
        self.saves.append(step)
        state = self.adamw.state()
        if step % self.own.refresh:  # else they are made anew
            state |= {f"{kind}/{name}": t for kind, some in self.directions.items() for name, t in some.items()}
        counts = {"saves": self.saves, "losses": self.losses}
        write_tensors(self.storage, STATE, state, carried(self.fingerprint, counts))


def _tasks(base: LaneTask, lanes: Sequence[Sequence[Group]]) -> list[LaneTask]:
    return [replace(base, part=f"step {base.step} {base.what} {i}", groups=groups) for i, groups in enumerate(lanes)]


def _tensors(result: LaneResult) -> dict[str, torch.Tensor]:
    """Copies, in the order of the names."""
    return {name: torch.tensor(result.total[name]) for name in sorted(result.total)}


@contextmanager
def _one_thread() -> Iterator[None]:
    """The driver's own sums must not depend on how many threads its machine would give it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""value with valuation.schedule=rehearsal: the paper's closed loop over the data, on the scored modules alone.

Workers hold the model, and the course (weights, moments, directions, sums of gradients) lies in the store in pieces that
they make (rehearsal_course.py); the driver has names and norms, and the values so far, which lie on its disk. A lost worker
costs its lanes where the store has nothing of it; a lost driver, and what the store has lost, the steps since the last save
under values/rehearsal/, which is removed when values/ is complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alphatoken.data_schemas import COMPONENTS
from alphatoken.pipeline.anchor.tensors import counts_of
from alphatoken.pipeline.cluster.token_batches import CPU_TOKENS
from alphatoken.pipeline.cluster.work import Lost, Pool, Shared
from alphatoken.pipeline.cluster.worker_log import logged
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
from alphatoken.pipeline.value.rehearsal_course import Course
from alphatoken.pipeline.value.rehearsal_pieces import PLACE, STATE
from alphatoken.pipeline.value.rehearsal_rows import RehearsedRows
from alphatoken.pipeline.value.rehearsal_worker import Group, LaneResult, LaneTask, RehearsalWorker

LOST_IN_A_ROW = 5  # times that the course is begun again from one save
STABILITY = "valuation.rehearsal.stability_weight"


def rehearse(run: Run) -> None:
    """Write values/ with the column ``kept``, unless done already. Raises SettingsWrong and RunFailed."""
    started, storage, models, own = time.monotonic(), run.storage, run.models, run.settings.model
    if run.manifest.pairs:
        raise SettingsWrong([NO_PAIRS])
    anchor, valuation = checked_anchor(run), run.settings.valuation
    weighed = valuation.rehearsal.stability_weight > 0
    if weighed and "fisher" not in anchor["counts"]:
        held_out = run.manifest.stage("prepare")["counts"].get("fisher_rows", 0)  # for a Fisher
        first, wanted = "anchor" if held_out else "prepare", {
            STABILITY: valuation.rehearsal.stability_weight, "valuation.schedule": "rehearsal", "anchor.drift": "auto",
        }  # fmt: skip
        raise SettingsWrong(
            [f"{STABILITY} needs a Fisher, which the anchors were made without: make others, "
             f"{anew(run.storage.place, first, wanted)}, or set {STABILITY}=0"]
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
    data = RehearsedRows(storage, rows, run.settings)
    if data.steps == 1:
        run.progress.say(
            f"value: warning: the rehearsal is one step, of {data.rows} rows, and values all at the untouched model: set "
            "valuation.rehearsal.batch_size below that"
        )
    with (
        run.cluster.pool(logged("value", RehearsalWorker), arguments, resources) as pool,
        run.progress.task("value: rehearsal", data.tokens, "tokens") as task,
    ):
        counts, again = _whole(lambda: _Rehearsal(storage, run.settings, fingerprint, data, pool, task), task)
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
        + (f"; went back to a save {again} times, for what was lost with a worker" if again else "")
    )


def _whole(made: Callable[[], _Rehearsal], task: Task) -> tuple[dict[str, Any], int]:
    """What the manifest records, and how often the course had to go back to its last save. Raises RunFailed."""
    again, in_a_row, before = 0, 0, -1
    while True:
        rehearsal = made()
        try:
            return rehearsal.run(), again
        except Lost as error:
            step = rehearsal.saves[-1]
            again, in_a_row, before = again + 1, in_a_row + 1 if step == before else 1, step
            if in_a_row >= LOST_IN_A_ROW:
                raise RunFailed(
                    f"the rehearsal has lost what its workers had made {in_a_row} times since step {step} ({error}): set a "
                    "smaller valuation.rehearsal.save_every, and run the same command again, it goes on from there"
                ) from error
            what = "its last save" if step else "its beginning"
            task.progress.warn(
                f"value: what a lost worker had made is gone ({error}): the rehearsal goes back to step {step}, {what}"
            )


class _Rehearsal:
    """One course over the data, from its beginning or from the last save."""

    def __init__(
        self, storage: Storage, settings: Settings, fingerprint: str, data: RehearsedRows, pool: Pool, task: Task
    ) -> None:
        self.storage, self.own, self.fingerprint = storage, settings.valuation.rehearsal, fingerprint
        self.data, self.pool, self.task = data, pool, task
        self.course = Course(pool, task, fingerprint, self.own.stability_weight > 0)
        self.saves = [0]
        budget = settings.valuation.tokens_per_batch
        # Not from the device's memory, which may differ from one start to the next.
        self.budget = budget if isinstance(budget, int) else CPU_TOKENS
        self.validation = data.validation_groups(self.budget)
        self.losses: list[float] = []  # on the validation set, at every refresh
        self.directed = -1  # the step at which the directions were made

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
        """The step to begin with; the course is as before it."""
        saved = counts_of(self.storage, STATE, self.fingerprint)
        if saved is None or not self.data.read(self.storage, PLACE, saved["saves"], self.fingerprint):
            self.task.at(0)
            self.course.begin(0, False)
            return 0
        self.saves, self.losses = saved["saves"], saved["losses"]
        step = self.saves[-1]
        if self._directed_by_state(step):
            self.directed = step
        self.task.at(sum(len(self.data.input_ids(row)) for s in range(step) for row in self.data.batch(s)))
        self.course.begin(step, self._directed_by_state(step))
        self.task.progress.say(f"value: the rehearsal goes on from step {step} of {self.data.steps}")
        return step

    def _directed_by_state(self, step: int) -> bool:
        """Whether the state before ``step`` has the directions; else they are made anew at it."""
        return step % self.own.refresh != 0

    def _step(self, step: int) -> None:
        """Value, threshold within the batch, masked step."""
        data, own = self.data, self.own
        if step % own.refresh == 0:
            self._refresh(step)
        rows_of = self._lanes(step)
        lanes = self._valued(step, rows_of)
        self._decide(data.batch(step))
        if step + 1 == data.steps:
            return  # no value would see the weights
        masked = [
            [replace(group, labels=[without_masked(data.labels(row), data.kept(row)) for row in rows])
             for group, rows in zip(groups, some, strict=True)]
            for groups, some in zip(lanes, rows_of, strict=True)
        ]  # fmt: skip
        total, tokens, _, _ = self._summed("gradient", step, masked)
        gradient = self.course.mean(step, total, tokens)
        del total  # of the store's room it takes a sum for each lane
        self.course.move(step, *gradient, schedule(step, data.steps))

    def _valued(self, step: int, rows_of: Sequence[Sequence[Sequence[int]]]) -> list[list[Group]]:
        """Find the values of a step's rows; returns its lanes with their hidden states."""
        data = self.data
        lanes = [[data.group(rows) for rows in lane] for lane in rows_of]

        def put(number: int, result: LaneResult) -> None:
            for rows, columns in zip(rows_of[number], result.columns, strict=True):
                for place, row in enumerate(rows):
                    data.put(row, columns[:, place])
            (lanes[number],) = _with_hidden([lanes[number]], result.hidden)

        units = [sum(len(ids) for group in lane for ids in group.input_ids) for lane in lanes]
        base = replace(self._task("values", step), directed=self.directed, directions=tuple(self.course.directions))
        self._each(base, [[lane] for lane in lanes], put, units)
        return lanes

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

    def _refresh(self, step: int) -> None:
        """Both directions at the present weights; the validation set's lower layers run for the first of them alone."""
        total, tokens, loss, hidden = self._summed("direction", step, self.validation)
        if not tokens:
            raise RunFailed("the validation set has no response token: give other rows with data.validation")
        self.validation = _with_hidden(self.validation, hidden)
        self.course.direct(step, total, tokens)
        self.losses.append(loss / tokens)
        self.directed = step

    def _lanes(self, step: int) -> list[list[list[int]]]:
        """Row numbers of the step's groups, by lane."""
        batch = self.data.batch(step)
        lanes = lanes_of([len(self.data.input_ids(row)) for row in batch], self.budget)
        return [[[batch[i] for i in group] for group in lane] for lane in lanes]

    def _summed(
        self, what: str, step: int, lanes: Sequence[Sequence[Group]]
    ) -> tuple[list[Sequence[Shared]], int, float, list[Shared | None]]:
        """Sums of the gradient to be added up in their order, by piece; tokens, loss, and the hidden states of the groups."""
        found: list[LaneResult] = []
        # One worker adds up all lanes by itself, so that it holds one sum and not one for each.
        several = [[lane] for lane in lanes] if self.pool.workers > 1 else [lanes]
        self._each(self._task(what, step), several, lambda number, result: found.append(result))
        hidden = [one for result in found for one in result.hidden]
        loss = sum(loss for result in found for loss in result.losses)
        return [result.total for result in found], sum(result.tokens for result in found), loss, hidden

    def _task(self, what: str, step: int) -> LaneTask:
        course = self.course
        return LaneTask(what, step, tuple(course.masters), tuple(course.pieces), course.store)

    def _each(
        self, base: LaneTask, lanes: Sequence[Sequence[Sequence[Group]]], take: Callable[[int, LaneResult], None],
        units: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Run ``base`` with each of ``lanes``."""
        names = [f"step {base.step} {base.what} {number}" for number in range(len(lanes))]
        self.course.in_order.run(names, lambda i: replace(base, part=names[i], lanes=lanes[i]), take, units)

    def _save(self, step: int) -> None:
        """The values since the last save, then the state, which names all saves."""
        self.data.save(self.storage, PLACE, (self.saves[-1], step), self.fingerprint)
        saves = [*self.saves, step]
        self.course.save(step, self._directed_by_state(step), {"saves": saves, "losses": self.losses})
        self.saves = saves


def _with_hidden(lanes: Sequence[Sequence[Group]], hidden: Sequence[Shared | None]) -> list[list[Group]]:
    """The groups with the hidden states that were found for them."""
    found = iter(hidden)
    return [[group if (new := next(found)) is None else replace(group, hidden=new) for group in lane] for lane in lanes]

"""One unrolled run: a simulated training run over the examples in one order, the sweep back over it, and what came of it.

Both halves go on from where they were saved. After the sweep the run is made once more without the tokens of the lowest
values, and how far both objectives' validation losses fall by that is told, apart for rows that made the direction and
for rows that did not: with few rows the direction fits those rows and not the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alphatoken.pipeline.anchor.objectives import response_tokens, shares_of_adaptation, with_adaptation
from alphatoken.pipeline.anchor.own_step import PLACE, OwnSteps
from alphatoken.pipeline.anchor.places import FISHER, PARTIAL, POLICY, REFERENCE, TOKENS_PER_PASS, made
from alphatoken.pipeline.anchor.saving import Saving
from alphatoken.pipeline.anchor.tape import Tape, kept_every, too_long
from alphatoken.pipeline.anchor.tensors import carried, mapped_tensors, read_tensors, write_tensors
from alphatoken.pipeline.maths.adapters import Adapters
from alphatoken.pipeline.maths.batch import IGNORED, Batch, Sequences, by_token_budget
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.directions import fisher_drift
from alphatoken.pipeline.maths.epochs import row_order
from alphatoken.pipeline.maths.forward import token_losses_of
from alphatoken.pipeline.maths.learners import ScoredWeights, Trained
from alphatoken.pipeline.maths.passes import Passes, alone
from alphatoken.pipeline.maths.placement import device_of
from alphatoken.pipeline.maths.simulated import Descent, Diverged, SimulatedRun, Taped, Tensors, simulate
from alphatoken.pipeline.maths.unroll import SWEPT_TOKENS, Adjoint, Swept, loss_gradient, pulled, pushed, sweep
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.objectives import RETENTION
from alphatoken.pipeline.settings.unroll import UnrollSettings

LEFT_OUT = 10  # every tenth validation row makes no direction
DROPPED = 0.1  # of the tokens, when the run is made again without the lowest
HALVES = 3  # units per step: the simulated run, the sweep back, and the run without the lowest tokens
WEIGHTS_MEASURED = 3  # before the run, at its end, at the end of the run without the lowest tokens
FORWARDS_PER_STEP = 3  # that take about as long as a step, which goes forward, back and to its weights' gradients


@dataclass(frozen=True, slots=True)
class Held:
    """Validation rows that make directions, and rows that do not."""

    made: Sequences
    left_out: Sequences

    @classmethod
    def of(cls, validation: Sequences) -> Held:
        """Every tenth row is left out."""
        apart = range(LEFT_OUT - 1, len(validation), LEFT_OUT)
        return cls(validation.take([i for i in range(len(validation)) if i not in apart]), validation.take(apart))


def steps_to_measure(rows: int, batch_size: int) -> int:
    """About how many steps of ``batch_size`` examples take as long as the loss of ``rows`` rows."""
    return -(-rows // (FORWARDS_PER_STEP * batch_size))


def units_of(unroll: UnrollSettings, held: Mapping[str, Held]) -> int:
    """How often ``advance`` counts one in an order: steps, and what it takes to measure validation losses at the end."""
    several = [one for name, one in held.items() if name != RETENTION]
    rows = [sum(len(one.made) for one in several), sum(len(one.left_out) for one in several)]
    return HALVES * unroll.steps + WEIGHTS_MEASURED * sum(steps_to_measure(each, unroll.batch_size) for each in rows)


def points_of(steps: int, snapshots: int) -> list[int]:
    """Before which of ``steps`` steps each snapshot is taken: the middle of each of ``snapshots`` equal parts."""
    return [(2 * index + 1) * steps // (2 * snapshots) for index in range(snapshots)]


def rows_of_steps(examples: int, unroll: UnrollSettings, seed: int, order: int) -> list[list[int]]:
    """Which of ``examples`` each step trains on: depends on seed and ``order`` alone."""
    return row_order(examples, unroll.batch_size, unroll.steps, f"{seed} {order}")


def learner_of(scored: ScoredLayers, unroll: UnrollSettings, seed: int) -> Trained:
    """What a simulated run trains. Raises UnsupportedModel."""
    if unroll.train == "lora":
        return Adapters(scored, unroll.rank, seed)
    return ScoredWeights(scored, rounded=False)


class UnrolledRun:
    """Makes one order with the model of ``scored`` at its own weights. Raises RunFailed."""

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        scored: ScoredLayers,
        examples: Sequences,
        held: Mapping[str, Held],
        passes: Passes = alone,
    ) -> None:
        """``held``: objective -> its validation rows: adaptation, or one for each task; retention. ``passes``: makes those of a
        step."""
        self.passes = passes
        self.storage, self.settings, self.scored, self.held = storage, settings, scored, held
        self.unroll, self.kernel, self.examples = settings.anchor.unroll, settings.model.attention, examples
        self.device = device_of(scored.model)
        self.descent = Descent("adam", self.unroll.rate, self.unroll.steps)
        self.seed = settings.run.seed
        self.start: Tensors = {}
        self.batches: list[list[Batch]] = []
        self.rows: list[list[int]] = []  # of every step: the examples of its passes, one after the other

    def __call__(self, order: int, drift: str, fingerprint: str, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write the policy and minus the residuals of every snapshot of this order; returns the counts.

        ``advance`` is called with 1 for every step of the simulated run, of the sweep and of the run made again, and while the
        losses are measured: ``units_of`` in all.
        """
        self._make_batches(order)
        self.seed = self.settings.run.seed + order
        self.start = {name: weight.float().clone() for name, weight in self._learner().start().items()}
        weights = sum(tensor.numel() for tensor in self.start.values())
        every = kept_every(self.unroll.steps, weights, self.unroll.tape_bytes)
        if every is None:
            raise RunFailed(too_long(self.unroll.steps, weights, self.unroll.tape_bytes))
        try:
            return self._made(order, drift, fingerprint, every, advance)
        except Diverged as error:
            raise RunFailed(
                f"anchor.unroll, order {order}: {error}; try a smaller anchor.unroll.learning_rate"
            ) from error

    def _made(
        self, order: int, drift: str, fingerprint: str, every: int, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        steps, first = self.unroll.steps, order * self.unroll.snapshots
        points = points_of(steps, self.unroll.snapshots) if self.settings.valuation.looks_at_anchors else []
        snapshots = {step: first + i for i, step in enumerate(points)}
        forward = Saving(self.storage, f"{PARTIAL}/unroll-forward-{order:02d}.safetensors", fingerprint)
        marks = carried(fingerprint, {})

        def again(first: int, stop: int) -> None:
            begin = tape.state_before(first)
            start = (begin, read_tensors(self.storage, tape.state_name(begin))) if begin else None

            def put(step: int, taped: Taped) -> None:
                if step >= first or every == 1:
                    tape.put(step, taped)

            anew = SimulatedRun(self.start, self.descent, start)
            simulate(self._learner(), anew, self.batches, self.kernel, put, stop, passes=self.passes)

        tape = Tape(self.storage, order, fingerprint, self.start, steps, every, again)
        run = SimulatedRun(self.start, self.descent, forward.last_state())
        advance(run.done)

        def keep(step: int, taped: Taped) -> None:
            if every == 1:
                tape.put(step, taped)
            if step in snapshots:
                policy = self._learner().merged(taped.weights)
                write_tensors(self.storage, POLICY.format(index=snapshots[step]), policy, marks)

        def after(done: int) -> None:
            if every > 1 and done < steps and done % every == 0:
                write_tensors(self.storage, tape.state_name(done), run.state(), marks)
            forward(done, run.state(), last=done == steps)
            advance(1)

        simulate(self._learner(), run, self.batches, self.kernel, keep, after=after, passes=self.passes)
        found = self._swept(order, drift, fingerprint, tape, run.masters(), snapshots, advance)
        return {**found, "tape_every": every, "examples": len(self.examples), "steps": steps}

    def _swept(
        self,
        order: int,
        drift: str,
        fingerprint: str,
        tape: Tape,
        end: Tensors,
        snapshots: dict[int, int],
        advance: Callable[[int], None],
    ) -> dict[str, Any]:
        saving = Saving(self.storage, f"{PARTIAL}/unroll-sweep-{order:02d}.safetensors", fingerprint)
        saved, marks, values = saving.last_state(), carried(fingerprint, {}), {}
        step, learner = self.unroll.steps, self._learner()
        if saved is not None:
            step, state = saved
            values = {int(key): one for key, one in _below("values/", state).items()}
            adjoints = {name: _restored(state, name, self.start) for name in self._objectives(drift)}
            advance(self.unroll.steps - step)
        else:
            adjoints = {name: Adjoint.at_the_end(one) for name, one in self._ends(drift, end).items()}

        own_steps = OwnSteps(self.examples, None if saved is None else _below("own/", saved[1]))
        shares = shares_of_adaptation({name: response_tokens(held.made) for name, held in self.held.items()})

        def found(step: int, swept: Swept) -> None:
            if swept.values:  # a batch may have no labelled token
                named = {name: {"": one} for name, one in swept.values.items()}
                own = {name: one[""] for name, one in with_adaptation(named, shares).items()}
                values[step] = own["adaptation"].cpu()  # as those of a run that went on, which were read
                own_steps.add(self.rows[step], own)
            if step in snapshots:
                for objective, residual in with_adaptation(swept.residuals(), shares).items():
                    minus = {n: -tensor for n, tensor in pushed(learner, swept.weights, residual).items()}
                    write_tensors(self.storage, made(objective, snapshots[step]), minus, marks)
            state = {f"values/{t:05d}": one for t, one in values.items()}
            state |= {f"own/{name}": one for name, one in own_steps.state().items()}
            for name, adjoint in adjoints.items():
                state |= {f"weights/{name}/{key}": tensor for key, tensor in adjoint.weights.items()}
                state |= {f"momentum/{name}/{key}": tensor for key, tensor in adjoint.momentum.items()}
            saving(step, state, last=step == 0)
            advance(1)

        sweep(learner, self.descent, self.batches, tape, adjoints, found, step, self.passes)
        if self.settings.valuation.own_step:
            write_tensors(self.storage, PLACE.format(order=order), own_steps.as_file(), marks)
        tokens = sum(len(one) for one in values.values())
        return {"tokens": tokens, **self._falls(end, values, advance)}

    def _ends(self, drift: str, end: Tensors) -> dict[str, Tensors]:
        """The gradient of each objective at the end of the run."""
        found, learner = {}, self._learner()
        for objective, held in self.held.items():
            found[objective], _, _ = loss_gradient(learner, end, self._batches_of(held.made), self.kernel, self.passes)
        if drift != "none":
            fisher, reference = (mapped_tensors(self.storage, name) for name in (FISHER, REFERENCE))
            drifts = {
                name: fisher_drift(fisher[name].to(weight), weight, reference[name].to(weight))
                for name, weight in learner.merged(end).items()
            }
            found["stability"] = pulled(learner, end, drifts)
        return found

    def _falls(self, end: Tensors, values: dict[int, torch.Tensor], advance: Callable[[int], None]) -> dict[str, float]:
        """Validation losses before the run, at its end, and at the end of the run without the lowest tokens."""
        every = torch.cat([values[step] for step in sorted(values)])
        lowest = float(every.sort().values[int(DROPPED * len(every))]) if len(every) else 0.0
        kept = [_without(passes, values.get(step, every[:0]) >= lowest) for step, passes in enumerate(self.batches)]
        run = SimulatedRun(self.start, self.descent)
        simulate(
            self._learner(), run, kept, self.kernel, lambda t, taped: None, after=lambda done: advance(1), passes=self.passes
        )  # fmt: skip
        found = {}
        of_tasks = [held for name, held in self.held.items() if name != RETENTION]
        for rows, several in (("made", [h.made for h in of_tasks]), ("left_out", [h.left_out for h in of_tasks])):
            for when, weights in (("before", self.start), ("after", end), ("masked", run.masters())):
                found[f"{rows}_{when}"] = self._loss(several, weights, advance)
        return found

    def _loss(self, several: Sequence[Sequences], weights: Tensors, advance: Callable[[int], None]) -> float:
        loss, tokens, seen, told = 0.0, 0, 0, 0
        rows = sum(len(sequences) for sequences in several)
        units = steps_to_measure(rows, self.unroll.batch_size)
        with self._learner().holding(weights):
            for batch in [batch for sequences in several for batch in self._batches_of(sequences)]:
                losses = token_losses_of(self.scored.model, batch, self.kernel)
                loss, tokens = loss + float(losses.double().sum()), tokens + len(batch.predicting())
                seen += len(batch.lengths)
                advance(units * seen // rows - told)
                told = units * seen // rows
        return loss / max(1, tokens)

    def _learner(self) -> Trained:
        return learner_of(self.scored, self.unroll, self.seed)

    def _objectives(self, drift: str) -> list[str]:
        return [*self.held, *(["stability"] if drift != "none" else [])]

    def _make_batches(self, order: int) -> None:
        """Of every step the passes that make up its batch, and the examples in them."""
        self.batches, self.rows = [], []
        for rows in rows_of_steps(len(self.examples), self.unroll, self.settings.run.seed, order):
            groups = _groups(self.examples.take(rows), SWEPT_TOKENS)
            self.batches.append([self._batch(self.examples.take([rows[i] for i in group])) for group in groups])
            self.rows.append([rows[i] for group in groups for i in group])

    def _batches_of(self, sequences: Sequences) -> list[Batch]:
        return [self._batch(sequences.take(group)) for group in _groups(sequences, TOKENS_PER_PASS)]

    def _batch(self, sequences: Sequences) -> Batch:
        return sequences.batch().to(self.device)


def _groups(sequences: Sequences, tokens: int) -> list[list[int]]:
    return by_token_budget([len(ids) for ids in sequences.input_ids], tokens)


def _below(prefix: str, state: Tensors) -> Tensors:
    return {key.removeprefix(prefix): one for key, one in state.items() if key.startswith(prefix)}


def _restored(state: Tensors, objective: str, like: Tensors) -> Adjoint:
    parts = [{n: state[f"{kind}/{objective}/{n}"].to(w) for n, w in like.items()} for kind in ("weights", "momentum")]
    return Adjoint(*parts)


def _without(passes: Sequence[Batch], kept: torch.Tensor) -> list[Batch]:
    """The same passes where the labels of tokens that are not ``kept`` (n,), over all of them in order, are ignored."""
    found, start = [], 0
    for batch in passes:
        predicting = batch.predicting()
        own = kept[start : start + len(predicting)].to(predicting.device)
        start += len(predicting)
        labels = batch.labels.flatten().clone()
        labels[predicting[~own] + 1] = IGNORED
        found.append(Batch(batch.input_ids, labels.view_as(batch.labels), batch.lengths))
    return found

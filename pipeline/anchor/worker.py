"""The anchor's worker: holds one model, the reference or the policy, and makes sums over examples with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from alphatoken.pipeline.anchor.coverage import checked_layers
from alphatoken.pipeline.anchor.direction_files import DirectionFiles
from alphatoken.pipeline.anchor.engine import Engine
from alphatoken.pipeline.anchor.loading import held_model
from alphatoken.pipeline.anchor.places import PARTIAL, TOKENS_PER_PASS
from alphatoken.pipeline.anchor.saving import Saving
from alphatoken.pipeline.anchor.shared_passes import SharedPasses, help_leads
from alphatoken.pipeline.anchor.sums import AddTask, WriteTask
from alphatoken.pipeline.anchor.tensors import carried, mapped_tensors, write_tensors
from alphatoken.pipeline.anchor.unrolled import Held, UnrolledRun, learner_of
from alphatoken.pipeline.cluster.work import Board, Shared
from alphatoken.pipeline.maths.batch import Batch, Sequences, by_token_budget, response_start
from alphatoken.pipeline.maths.capture import Captured, swapped
from alphatoken.pipeline.maths.decoder import UnsupportedModel
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.epochs import row_order
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.kronecker import KroneckerFactors
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.nonfinite import NonFinite, locate
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.passes import alone
from alphatoken.pipeline.maths.placement import device_of
from alphatoken.pipeline.maths.sampling import sample_completions
from alphatoken.pipeline.maths.second_order import check_second_derivative
from alphatoken.pipeline.maths.valuer import TokenValuer, check_model
from alphatoken.pipeline.maths.warmup import snapshot_steps, warm_up
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

PROMPTS_PER_BATCH = 16
NO_ROWS = Sequences([], [], [])
WARMUP_STATE = f"{PARTIAL}/warm-up.safetensors"


@dataclass(frozen=True, slots=True)
class AnchorTask:
    """``what``: weights | fisher | warmup | gradient | unroll | help | directions; ``output``: the file to write.

    ``board``, ``store``: where passes of unrolled runs are shared with workers that help; None: with nobody.
    """

    what: str
    output: str  # for a warm-up, with {index} in the place of the snapshot's number
    sequences: Sequences
    seed: int = 0  # of this task alone
    weights: str | None = None  # a file with the scored weights to use instead of the model's own
    fingerprint: str = ""  # what the output carries
    index: int = 0  # of the snapshot; of an unrolled run, of its order
    held: Mapping[str, Held] = field(default_factory=dict)  # of an unrolled run: objective -> its validation rows
    drift: str = "none"
    metadata: dict[str, str] = field(default_factory=dict)
    board: Board | None = None
    store: Callable[[Any], Shared] | None = None


class AnchorWorker:
    """Holds one model, the reference or the policy, and makes sums over examples with it."""

    def __init__(self, storage: Storage, source: ModelSource, settings: Settings, eos: Sequence[int]) -> None:
        self.storage, self.settings, self.eos = storage, settings, eos
        model = held_model(source, settings, source.path)
        self.device = device_of(model)
        self.scored = checked_layers(model, settings, settings.anchor_layers)
        self.kernel = settings.model.attention
        try:  # before the Fisher, and not when there are directions for a TokenValuer
            own = settings.valuation
            check_model(self.scored, own.scores, own.window, self.kernel, own.exact)
            if settings.anchor.unrolled:
                check_second_derivative(learner_of(self.scored, settings.anchor.unroll, seed=0))
        except UnsupportedModel as error:
            raise RunFailed(f"model.policy: {error}") from error
        self.engine = Engine(self.scored, settings, source.path)
        self.device_lock = threading.Lock()  # two shards are in flight, one at a time uses the model

    def __call__(self, task: AnchorTask | AddTask | WriteTask, advance: Callable[[int], None]) -> Any:
        """Run one task; returns counts, which the output carries as well, or what a task of a sum returns."""
        if not isinstance(task, AnchorTask):
            return task(self.storage, advance)  # without the model
        work = {
            "weights": self._weights, "fisher": self._fisher, "warmup": self._warmup, "gradient": self._gradient,
            "unroll": self._unroll, "directions": self._directions,
        }  # fmt: skip
        if task.what == "help":  # takes the model pass by pass
            return self._help(task, advance)
        with self.device_lock:
            self.engine(task.sequences.input_ids)
            return work[task.what](task, advance)

    def _weights(self, task: AnchorTask, advance: Callable[[int], None]) -> dict[str, Any]:
        counts = {"coverage": asdict(self.scored.coverage)}
        self._save(task, task.output, self.scored.weights(), counts)
        return counts

    def _fisher(self, task: AnchorTask, advance: Callable[[int], None]) -> dict[str, Any]:
        """Sums over sampled completions, float32: (d^2)^T (h^2), and Kronecker factors where they are wanted."""
        fisher = self.settings.anchor.fisher
        torch.manual_seed(task.seed)
        total, tokens = OuterSum(self.scored, squared=True), 0
        factors = KroneckerFactors(self.scored) if self.settings.anchor.precondition == "kfac" else None

        def visit(captured: Captured) -> None:
            total(captured)
            if factors is not None:
                factors(captured)

        prompts = [
            _prompt(ids, labels) for ids, labels in zip(task.sequences.input_ids, task.sequences.labels, strict=True)
        ]
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        for start in range(0, len(order), PROMPTS_PER_BATCH):
            rows = order[start : start + PROMPTS_PER_BATCH]
            shown = _Sampling(len(rows), fisher.max_new_tokens, advance)
            sampled = sample_completions(
                self.scored.model,
                [prompts[i] for i in rows],
                fisher.max_new_tokens,
                fisher.temperature,
                self.eos,
                shown.step,
            )
            for group in by_token_budget(sampled.lengths.tolist(), TOKENS_PER_PASS):
                batch = sampled.rows(torch.tensor(group))
                if factors is not None:
                    factors.positions = batch.predicting()
                losses = ghost_pass(self.scored, batch, visit, self.kernel)
                self._finite(losses, batch, [task.sequences.ids[rows[i]] for i in group])
                tokens += len(losses)
            shown.end()
        counts = {"prompts": len(prompts), "tokens": tokens}
        self._save(task, task.output, {**total.total, **(factors.total if factors is not None else {})}, counts)
        return counts

    def _warmup(self, task: AnchorTask, advance: Callable[[int], None]) -> dict[str, Any]:
        warmup = self.settings.anchor.warmup
        order = row_order(len(task.sequences), warmup.batch_size, warmup.steps, task.seed)
        batches = [task.sequences.take(rows).batch().to(self.device) for rows in order]
        snapshots = {step: i for i, step in enumerate(snapshot_steps(warmup.steps, self.settings.anchor.snapshots))}

        def keep(steps: int, masters: dict[str, torch.Tensor]) -> None:
            if steps in snapshots:
                self._save(task, task.output.format(index=snapshots[steps]), masters)

        saving = Saving(self.storage, WARMUP_STATE, task.fingerprint)
        # In copies of the weights: the model itself stays what the checkpoint says, should this be done again here.
        copies = {name: weight.clone() for name, weight in self.scored.weights().items()}
        try:
            with swapped(self.scored, copies):
                warm_up(
                    self.scored, batches, warmup.learning_rate, self.kernel, advance, keep, saving, saving.last_state()
                )
        except NonFinite as error:
            raise RunFailed(f"warm-up: {error}; try a smaller anchor.warmup.learning_rate") from error
        return {"steps": warmup.steps, "examples": len(task.sequences.ids)}

    def _gradient(self, task: AnchorTask, advance: Callable[[int], None]) -> dict[str, Any]:
        """Sum of d h^T over the positions that predict a response token, float32; divided by their number later."""
        weights = mapped_tensors(self.storage, task.weights) if task.weights else None
        total, positions, loss = OuterSum(self.scored), 0, 0.0
        lengths = [len(ids) for ids in task.sequences.input_ids]
        moved = ", or set a smaller anchor.warmup.learning_rate" if weights else ""
        with swapped(self.scored, weights):
            for group in by_token_budget(lengths, TOKENS_PER_PASS):
                batch = task.sequences.take(group).batch().to(self.device)
                total.positions = batch.predicting()
                losses = ghost_pass(self.scored, batch, total, self.kernel)
                self._finite(losses, batch, [task.sequences.ids[i] for i in group], moved)
                positions, loss = positions + len(losses), loss + float(losses.double().sum())
                advance(len(group))
        counts = {"positions": positions, "loss": loss}
        self._save(task, task.output, total.total, counts)
        return counts

    def _unroll(self, task: AnchorTask, advance: Callable[[int], None]) -> dict[str, Any]:
        for held in task.held.values():
            self.engine([*held.made.input_ids, *held.left_out.input_ids])
        shared = None
        if task.board is not None and task.store is not None:
            shared = SharedPasses(task.board, task.output, task.store)
        passes = alone if shared is None else shared
        run = UnrolledRun(self.storage, self.settings, self.scored, task.sequences, task.held, passes)
        counts = run(task.index, task.drift, task.fingerprint, advance)
        if shared is not None:
            shared.leave()
            counts["helped"] = shared.helped
        self._save(task, task.output, {}, counts)
        return counts

    def _help(self, task: AnchorTask, advance: Callable[[int], None]) -> dict[str, Any]:
        assert task.board is not None and task.store is not None
        learner = learner_of(self.scored, self.settings.anchor.unroll, seed=0)  # whatever it learns comes from the lead
        return {"passes": help_leads(task.board, learner, task.store, self.device_lock, advance)}

    def _directions(self, task: AnchorTask, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write all directions of one snapshot; returns norms and scales."""
        assert task.weights is not None
        files = DirectionFiles(
            self.storage, self.settings, self.scored, self.device, task.index, task.weights, task.drift
        )
        return files.write(
            task.fingerprint, task.metadata, lambda found: self._root_mean_squares(found, task.sequences), advance
        )

    def _root_mean_squares(self, directions: Directions, sample: Sequences) -> dict[str, float]:
        """Per direction, the root mean square of direct + causal over the sample's response tokens; 1 where it is 0."""
        own = self.settings.valuation
        valuer = TokenValuer(self.scored.model, directions, own.layers, own.window, self.kernel, ["paper"])
        squares, tokens = dict.fromkeys(directions.named, 0.0), 0
        for group in by_token_budget([len(ids) for ids in sample.input_ids], TOKENS_PER_PASS):
            batch = sample.take(group).batch().to(self.device)
            found = valuer.value(batch)
            tokens += len(batch.predicting())
            for name in squares:
                squares[name] += float((found[f"{name}_direct"] + found[f"{name}_causal"]).double().square().sum())
        return {name: (total / tokens) ** 0.5 if total else 1.0 for name, total in squares.items()}

    def _finite(self, losses: torch.Tensor, batch: Batch, ids: list[str], remedy: str = "") -> None:
        if not bool(torch.isfinite(losses).all()):
            error = locate(self.scored, batch, self.kernel)
            raise RunFailed(
                f"NaN or infinity in {error.where}, example {ids[error.row]}: check the model or its dtype{remedy}"
            )

    def _save(
        self, task: AnchorTask, name: str, tensors: dict[str, torch.Tensor], counts: dict[str, Any] | None = None
    ) -> None:
        write_tensors(self.storage, name, tensors, carried(task.fingerprint, counts or {}))


class _Sampling:
    """Counts prompts whose completions are sampled together as if one ended after the other, the last one after its gradient.

    Sampling takes nearly all of the time of a Fisher, and of a few prompts it would be one long silence.
    """

    def __init__(self, prompts: int, steps: int, advance: Callable[[int], None]) -> None:
        self.prompts, self.steps, self.advance = prompts, steps, advance
        self.done, self.told = 0, 0

    def step(self) -> None:
        """One more token of each."""
        self.done += 1
        self._tell((self.prompts * self.done - 1) // self.steps)

    def end(self) -> None:
        """All are done, however early their completions ended."""
        self._tell(self.prompts)

    def _tell(self, prompts: int) -> None:
        self.advance(prompts - self.told)
        self.told = prompts


def _prompt(input_ids: list[int], labels: list[int]) -> list[int]:
    """The tokens before the first response token."""
    return input_ids[: response_start(labels)]

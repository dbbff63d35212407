"""`plan --measure`: a short real run of the user's model on the user's rows, timed; about a minute for a small model.

Batches are those that the stages form, spread over all lengths: a few through the value pass, a few through the gradient
pass, and one batch of the Fisher's prompts with its whole completions.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import torch

from alphatoken.pipeline.anchor.coverage import layers_of
from alphatoken.pipeline.anchor.places import TOKENS_PER_PASS
from alphatoken.pipeline.anchor.worker import PROMPTS_PER_BATCH
from alphatoken.pipeline.cluster.token_batches import token_budget
from alphatoken.pipeline.maths.batch import Batch, Sequences, by_token_budget, collate, response_start
from alphatoken.pipeline.maths.costs import (
    DIRECTIONS,
    ModelCosts,
    ghost_flops,
    model_costs,
    outer_flops,
    sampling_flops,
    shapes_of,
    value_flops,
)
from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel
from alphatoken.pipeline.maths.directions import NAMES, Directions
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.outer_sums import OuterSum
from alphatoken.pipeline.maths.sampling import sample_completions
from alphatoken.pipeline.maths.valuer import TokenValuer
from alphatoken.pipeline.plan.calibration import Calibration, machine, threads
from alphatoken.pipeline.plan.sample import Sample, sample_data
from alphatoken.pipeline.prepare.tokenize import Example
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import Settings

SECONDS = 12.0  # for each kind of pass, at least; the batch that is under way is finished
FEWEST = 2  # batches of each kind, after one that is not counted
WORKER = "import alphatoken.pipeline.value.worker"


def measure(run: Run) -> Calibration:
    """Load the model, and time what a run would do. Raises SettingsWrong for a model or data that cannot be used."""
    began, settings = time.perf_counter(), run.settings
    with run.progress.task("plan: measure", 5, "measurements") as task, _threads(threads(run)):
        start = _seconds(lambda: subprocess.run([sys.executable, "-c", WORKER], check=True, capture_output=True))
        task.at(1)
        started = time.perf_counter()
        sample = sample_data(settings, run.models.policy)
        row = (time.perf_counter() - started) / sample.rows_read
        task.at(2)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        started = time.perf_counter()
        model = _loaded(run, device)
        load = time.perf_counter() - started
        rates = {}
        try:
            rates["value"] = _value_rate(model, sample, settings, device)
            task.at(3)
            if settings.valuation.needs_directions:
                costs, scored = model_costs(model, layers_of(model, settings.anchor_layers))
                rates["gradient"] = _gradient_rate(costs, scored, sample, settings, device)
                task.at(4)
                if sample.fisher:
                    rates["fisher"] = _fisher_rate(costs, scored, sample, settings)
        except UnsupportedModel as error:
            raise SettingsWrong([f"model.policy: {error}"]) from error
        task.at(5)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Calibration(machine(), now, start, load, row, rates, time.perf_counter() - began)


def _value_rate(model: Any, sample: Sample, settings: Settings, device: torch.device) -> float:
    own = settings.valuation
    costs, scored = model_costs(model, own.layers)
    directions, names = None, (*NAMES, *settings.objectives)
    if own.looks_at_anchors:
        torch.manual_seed(settings.run.seed)
        # A contraction costs the same whatever a direction holds, but for one of zeros.
        directions = Directions({n: {k: torch.randn_like(w) for k, w in scored.weights().items()} for n in names})
    valuer = TokenValuer(
        model, directions, own.layers, own.window, settings.model.attention, own.scores or ("loss",), own.exact
    )

    def flops(batch: Batch) -> int:
        shapes = shapes_of([batch.shape], len(batch.predicting()))
        looks = own.looks_at_anchors
        return value_flops(
            costs, shapes, own.window, 1, own.scores, own.exact and looks, looks, DIRECTIONS + len(settings.objectives)
        )

    return _rate(_batches(sample.train, token_budget(own.tokens_per_batch, device)), valuer.value, flops, device)


def _gradient_rate(
    costs: ModelCosts, scored: ScoredLayers, sample: Sample, settings: Settings, device: torch.device
) -> float:
    total = OuterSum(scored)

    def work(batch: Batch) -> None:
        total.positions = batch.predicting()
        ghost_pass(scored, batch, total, settings.model.attention)

    def flops(batch: Batch) -> int:
        shapes = shapes_of([batch.shape], len(batch.predicting()))
        return ghost_flops(costs, shapes) + outer_flops(costs, shapes.predicting)

    return _rate(_batches(sample.validation, TOKENS_PER_PASS), work, flops, device)


def _fisher_rate(costs: ModelCosts, scored: ScoredLayers, sample: Sample, settings: Settings) -> float:
    """Of the plan's count, which is of whole completions; those that end early make the rate higher."""
    fisher = settings.anchor.fisher
    prompts = [example.input_ids[: response_start(example.labels)] for example in sample.fisher[:PROMPTS_PER_BATCH]]
    ends = scored.model.generation_config.eos_token_id  # type: ignore[union-attr]  # an nn.Module to mypy
    eos: list[int] = ends if isinstance(ends, list) else [] if ends is None else [ends]  # type: ignore[list-item]
    torch.manual_seed(settings.run.seed)
    started = time.perf_counter()
    sampled = sample_completions(scored.model, prompts, fisher.max_new_tokens, fisher.temperature, eos)
    visitor = OuterSum(scored, squared=True)
    for group in by_token_budget(sampled.lengths.tolist(), TOKENS_PER_PASS):
        ghost_pass(scored, sampled.rows(torch.tensor(group)), visitor, settings.model.attention)
    _wait(sampled.input_ids.device)
    seconds, new, longest = time.perf_counter() - started, fisher.max_new_tokens, max(map(len, prompts))
    shapes = shapes_of([(len(prompts), longest + new)], len(prompts) * new)
    planned = sampling_flops(costs, len(prompts), longest, new)
    return (planned + ghost_flops(costs, shapes) + outer_flops(costs, shapes.tokens)) / seconds


def _rate(
    batches: Sequence[Batch], work: Callable[[Batch], object], flops: Callable[[Batch], int], device: torch.device
) -> float:
    """Operations per second over batches of all sizes, for SECONDS at least."""
    work(batches[-1].to(device))  # threads, kernels and pools are made on first use
    done, seconds, counted = 0, 0.0, 0
    for batch in _spread(batches):
        own = batch.to(device)
        _wait(device)
        started = time.perf_counter()
        work(own)
        _wait(device)
        seconds, done, counted = seconds + time.perf_counter() - started, done + flops(batch), counted + 1
        if seconds >= SECONDS and counted >= FEWEST:
            break
    return done / seconds


def _spread(batches: Sequence[Batch]) -> Iterator[Batch]:
    """All of them, those far from each other first."""
    left = list(range(len(batches)))
    step = max(1, len(left) // 2)
    while left:
        for index in left[step // 2 :: step]:
            yield batches[index]
        left = [i for at, i in enumerate(left) if at < step // 2 or (at - step // 2) % step]
        step = max(1, step // 2)


def _batches(examples: Sequence[Example], budget: int) -> list[Batch]:
    rows = Sequences([e.id for e in examples], [e.input_ids for e in examples], [e.labels for e in examples])
    groups = by_token_budget([len(ids) for ids in rows.input_ids], budget)
    return [collate([rows.input_ids[i] for i in group], [rows.labels[i] for i in group]) for group in groups]


def _loaded(run: Run, device: torch.device) -> Any:
    own = run.settings.model
    try:
        return load_model(here(ModelSource(run.models.policy, own.revision, own.dtype, own.trust_remote_code)), device)
    except UnreadableModel as error:
        raise SettingsWrong([f"model.policy: {error}"]) from error


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""data.shard_examples=auto: as many examples as one worker values in about a minute, of large data a 512th of all.

A shard is what a stopped run loses, and what is handed to a worker. By the rows' lengths, the model's sizes and the kind of
device alone, so that runs that differ in nothing but what is scored share what is prepared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from alphatoken.pipeline.maths.costs import forward_flops, meta_model, model_costs, shapes_of
from alphatoken.pipeline.maths.decoder import UnsupportedModel
from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel, load_config
from alphatoken.pipeline.plan.sample import Sample, sample_data
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong, first_line
from alphatoken.pipeline.run.remote import Unreachable, here
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import Settings

SECONDS = 60
# Operations of the forward pass per second of one worker that values: two cores of a CPU, and one GPU.
CPU_RATE, DEVICE_RATE = 3e10, 3e13
UNREADABLE = (SettingsWrong, RunFailed, UnsupportedModel, UnreadableModel, Unreachable)
FEWEST, MOST = 8, 1024  # examples
SHARDS = 512  # of large data: a file for every few rows costs `prepare` more than a kill can


@dataclass(frozen=True, slots=True)
class Extent:
    """``shard_examples``: of auto; ``tokens``: that are trained on, about, None where the data cannot be read."""

    shard_examples: int
    tokens: int | None


def begun_with(run: Run) -> int | None:
    """Examples per shard that the run was begun with, unless it is started anew; None before."""
    if run.settings.run.overwrite == "prepare":
        return None
    return run.manifest.stage("prepare").get("inputs", {}).get("data.shard_examples")


def extent(run: Run) -> Extent:
    """By a sample of the data; examples per shard are a power of two by what one costs.

    Where data or model cannot be read they are MOST: `prepare` is going to say why, better than this.
    """
    try:
        sample = sample_data(run.settings, run.models.policy)
    except UNREADABLE:
        return Extent(MOST, None)
    tokens = round(sum(len(example.input_ids) for example in sample.train) * sample.scale)
    try:
        cost = _example_flops(run, sample)
    except UNREADABLE:
        return Extent(MOST, tokens)
    except Exception as error:  # what a model class does on the meta device is its own; sizes are no reason to fail
        run.progress.say(
            f"data.shard_examples=auto: {MOST}, since the model's sizes cannot be told: {first_line(error)}"
        )
        return Extent(MOST, tokens)
    rate = DEVICE_RATE if _has_gpus(run.settings) else CPU_RATE
    fits = 2 ** math.floor(math.log2(max(1.0, SECONDS * rate / cost)))
    few_files = 2 ** math.ceil(math.log2(max(1.0, sample.train_inputs / SHARDS)))
    return Extent(min(MOST, max(FEWEST, fits, few_files)), tokens)


def _example_flops(run: Run, sample: Sample) -> float:
    """Operations of the forward pass over a row that is trained on, all of its windows or branches, as a mean over a sample."""
    own = run.settings.model
    source = here(ModelSource(run.models.policy, own.revision, trust_remote_code=own.trust_remote_code), weights=False)
    costs, _ = model_costs(meta_model(load_config(source), torch.bfloat16), 1)
    shapes = shapes_of([(1, len(example.input_ids)) for example in sample.train], 0)
    return forward_flops(costs, shapes) * sample.scale / sample.train_inputs


def _has_gpus(settings: Settings) -> bool:
    if settings.cluster.address is None:
        return torch.cuda.is_available()
    return settings.cluster.gpus_per_worker != 0

"""data.shard_examples=auto: as many examples as one worker values in about a minute.

A shard is what a stopped run loses, and what is handed to a worker. By the rows' lengths, the model's sizes and the kind of
device alone, so that runs that differ in nothing but what is scored share what is prepared.
"""

from __future__ import annotations

import math

import torch

from alphatoken.pipeline.maths.costs import forward_flops, meta_model, model_costs, shapes_of
from alphatoken.pipeline.maths.decoder import UnsupportedModel
from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel, load_config
from alphatoken.pipeline.plan.sample import sample_data
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong, first_line
from alphatoken.pipeline.run.remote import Unreachable, here
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import Settings

SECONDS = 60
# Operations of the forward pass per second of one worker that values: two cores of a CPU, and one GPU.
CPU_RATE, DEVICE_RATE = 3e10, 3e13
UNREADABLE = (SettingsWrong, RunFailed, UnsupportedModel, UnreadableModel, Unreachable)
FEWEST, MOST = 8, 1024  # examples


def shard_examples(run: Run) -> int:
    """Examples per shard: what the run was begun with, else a power of two by what an example costs.

    Where model or data cannot be read it is MOST: `prepare` is going to say why, better than this.
    """
    began = run.manifest.stage("prepare").get("inputs", {}).get("data.shard_examples")
    if began is not None and run.settings.run.overwrite != "prepare":
        return began
    try:
        cost = example_flops(run)
    except UNREADABLE:
        return MOST
    except Exception as error:  # what a model class does on the meta device is its own; sizes are no reason to fail
        run.progress.say(
            f"data.shard_examples=auto: {MOST}, since the model's sizes cannot be told: {first_line(error)}"
        )
        return MOST
    rate = DEVICE_RATE if _has_gpus(run.settings) else CPU_RATE
    return min(MOST, max(FEWEST, 2 ** math.floor(math.log2(max(1.0, SECONDS * rate / cost)))))


def tokens_of(run: Run) -> int | None:
    """Tokens of the data that is trained on, by a sample where nothing is prepared; None where it cannot be read."""
    prepared = run.manifest.stage("prepare")
    if run.manifest.done("prepare"):
        return prepared["counts"]["tokens"]
    try:
        sample = sample_data(run.settings, run.models.policy)
    except UNREADABLE:
        return None
    return round(sum(len(example.input_ids) for example in sample.train) * sample.scale)


def example_flops(run: Run) -> float:
    """Operations of the forward pass over a training example, of a pair over both branches, as a mean over a sample."""
    own = run.settings.model
    source = here(ModelSource(run.models.policy, own.revision, trust_remote_code=own.trust_remote_code), weights=False)
    costs, _ = model_costs(meta_model(load_config(source), torch.bfloat16), 1)
    sample = sample_data(run.settings, run.models.policy)
    shapes = shapes_of([(1, len(example.input_ids)) for example in sample.train], 0)
    return forward_flops(costs, shapes) * sample.scale / sample.train_rows


def _has_gpus(settings: Settings) -> bool:
    if settings.cluster.address is None:
        return torch.cuda.is_available()
    return settings.cluster.gpus_per_worker != 0

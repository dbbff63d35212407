"""The one place where a stage's worker loads a model: which devices are its own, and how the model lies on them."""

from __future__ import annotations

from typing import Any

import torch

from alphatoken.pipeline.maths.decoder import UnsupportedModel
from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.placement import DoesNotFit, Placement
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import Settings


def placement_of(settings: Settings) -> Placement:
    """How the models of a run lie on this worker's devices. Raises RunFailed where there are fewer than asked for."""
    own = settings.model
    return Placement(
        worker_devices(settings.cluster.devices_per_worker), settings.top_layers, settings.lower_dtype, own.offload,
        None if isinstance(own.device_bytes, str) else own.device_bytes,
    )  # fmt: skip


def worker_devices(asked: int) -> tuple[torch.device, ...]:
    """``asked`` GPUs, or the CPU where torch sees none and no more than one device is asked for. Raises RunFailed."""
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == 1:
        return (torch.device("cuda" if seen else "cpu"),)
    if seen < asked:
        what = f"torch sees {seen} GPU(s) here" if seen else "torch sees no GPU here"
        remedy = f"set it to {seen} at most" if seen > 1 else "leave it out"
        raise RunFailed(
            f"cluster.gpus_per_worker={asked}: {what} (CUDA_VISIBLE_DEVICES, driver, a torch for CPUs?): {remedy}, and see "
            "model.lower_dtype and model.offload for models that are too large"
        )
    return tuple(torch.device("cuda", index) for index in range(asked))


def check_devices(run: Run) -> None:
    """Raise RunFailed where a worker would not get the devices that it is to spread its model over.

    Before the manifest takes down what a stage is made with, since that depends on there being several.
    """
    if run.settings.cluster.devices_per_worker > 1:
        run.cluster.model_resources()


def held_model(source: ModelSource, settings: Settings, named: str = "model.policy") -> Any:
    """The model, laid out on this worker's devices; batches go to ``placement_of(settings).device``.

    ``named``: the key of the model, or its place. Raises RunFailed.
    """
    placement = placement_of(settings)
    if len(placement.devices) > 1:
        torch.cuda.set_device(placement.device)  # what names no index of its own
    try:
        return load_model(here(source), placement)
    except UnreadableModel as error:  # says itself which one
        raise RunFailed(str(error)) from error
    except (DoesNotFit, UnsupportedModel) as error:
        raise RunFailed(f"{named}: {error}") from error

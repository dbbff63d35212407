"""value with another method than AlphaToken's: the same files, straight from prepared/.

The score stands in `adaptation_direct`, the other components are 0.0, so that `mask` works as it is; `loss` is the
policy's, or 0.0 with the methods that run no model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from alphatoken.data_schemas import VALUES
from alphatoken.pipeline.cluster.batched_worker import BatchedWorker
from alphatoken.pipeline.maths.models import ModelSource, load_model
from alphatoken.pipeline.maths.selectors import SELECTORS
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.fingerprint import of_model
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Models, Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.value.stage import COLUMNS, ValueJob, ValueWorker


class SelectionWorker(ValueWorker):
    """Holds the models that the method runs, and scores one shard after the other."""

    def __init__(
        self, storage: Storage, sources: dict[str, ModelSource], settings: Settings, vocabulary: int | None
    ) -> None:
        """``sources``: policy and reference, as far as they are run. ``vocabulary``: ids in prepared/ are below it."""
        BatchedWorker.__init__(self, settings, runs_a_model=bool(sources))
        self.storage = storage
        models = {name: load_model(here(source), self.device) for name, source in sources.items()}
        for name, model in models.items():
            size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]  # an nn.Module to mypy
            if vocabulary is not None and size < vocabulary:
                raise RunFailed(
                    f"model.{name} knows {size} token ids, the data has {vocabulary}: it needs the policy's tokenizer"
                )
        self.models = models
        self.selector = SELECTORS[settings.valuation.method](models, settings.model.attention, settings.run.seed)

    def _values(self, batch: Any, ids: list[str]) -> dict[str, np.ndarray]:
        found = {name: column.cpu().numpy() for name, column in self.selector(batch, ids).items()}
        zeros = np.zeros(batch.shape, np.float32)
        return {**dict.fromkeys(COLUMNS, zeros), "adaptation_direct": found["score"], "loss": found["loss"]}


def check_models(settings: Settings, models: Models) -> None:
    """Raise SettingsWrong where the method compares two models and there is one."""
    method, policy, reference = settings.valuation.method, models.policy, models.reference
    if method == "excess_loss" and (policy == reference or of_model(policy) == of_model(reference)):
        raise SettingsWrong(
            [
                "valuation.method=excess_loss compares two models, but model.policy and model.reference are the same: "
                "set model.reference to a model that was trained on good data of the target"
            ]
        )


def _used(settings: Settings, models: Models) -> dict[str, str]:
    """The models that the method runs, by name."""
    names = SELECTORS[settings.valuation.method].models
    return {name: path for name, path in (("policy", models.policy), ("reference", models.reference)) if name in names}


def selection_inputs(settings: Settings, models: Models, upstream: str) -> dict[str, Any]:
    """Everything that values/ of ``valuation.method`` depend on; ``upstream``: the fingerprint of prepare."""
    own, used = settings.model, _used(settings, models)
    inputs: dict[str, Any] = {
        "prepare": upstream,
        "valuation.method": settings.valuation.method,
        "schema": (VALUES.metadata or {})[b"alphatoken.schema"].decode(),
        **{name: of_model(path) for name, path in used.items()},
    }
    if used:
        inputs |= {"model.revision": own.revision, "model.dtype": own.dtype}
    if settings.valuation.method == "random":
        inputs["run.seed"] = settings.run.seed
    return inputs


def selection_job(run: Run) -> ValueJob:
    """The job of ``valuation.method``; needs prepare alone. Raises RunFailed and SettingsWrong."""
    prepared = run.manifest.require("prepare", "value")
    settings, models, cluster = run.settings, run.models, run.cluster
    check_models(settings, models)
    inputs = selection_inputs(settings, models, prepared["fingerprint"])
    own, used = settings.model, _used(settings, models)
    sources = {name: ModelSource(p, own.revision, own.dtype, own.trust_remote_code) for name, p in used.items()}
    arguments = {
        "storage": run.storage,
        "sources": sources,
        "settings": settings,
        "vocabulary": prepared["counts"].get("vocabulary"),
    }
    return ValueJob(
        inputs, SelectionWorker, arguments, cluster.model_resources if used else cluster.tokenizer_resources
    )

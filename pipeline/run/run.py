"""`Run`: the one object that a stage is given.

It knows no stage. A stage reads what an earlier one left through that stage's own reader, given the run's storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from alphatoken.pipeline.run.fingerprint import seen_of_model
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings


@dataclass(frozen=True, slots=True)
class Models:
    """Resolved model.policy and model.reference: a local directory, a URI or a hub id each.

    ``policy``: the first checkpoint, whose tokenizer and configuration stand for all. ``checkpoints``: all of them.
    """

    checkpoints: tuple[str, ...]
    reference: str

    @property
    def policy(self) -> str:
        """The only checkpoint, or the first of several."""
        return self.checkpoints[0]

    def about(self) -> dict[str, str]:
        """The models among the inputs of a stage with what is seen of them, for messages."""
        return {
            "policy": ", ".join(seen_of_model(one) for one in self.checkpoints), "reference": seen_of_model(self.reference)
        }  # fmt: skip


class Workers(Protocol):
    """What stages use of a cluster, which is a floor above: alphatoken.pipeline.cluster.cluster.Cluster says it in full.

    ``Any`` stands for its Resources and its Pool.
    """

    def pool(self, make: Callable[..., Any], arguments: dict[str, Any], resources: Any) -> Any:
        """A pool of workers made by ``make(**arguments)``, to be used as a context manager."""

    def model_resources(self) -> Any:
        """Resources of workers that hold a model. Starts the cluster."""

    def tokenizer_resources(self) -> Any:
        """Resources of workers that hold a tokenizer or nothing. Starts the cluster."""

    def end_idle(self) -> None:
        """End worker processes that no pool uses."""

    def __exit__(self, *_: object) -> None:
        """End what was started."""


def _no_models() -> Models:
    raise RuntimeError("this Run was made without models: give it find_models")


def _no_cluster() -> Workers:
    raise RuntimeError("this Run was made without a cluster: give it join_cluster")


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory, what the run is told, and what it computes with.

    ``find_models``, ``join_cluster``: called whenever ``models`` or ``cluster`` is asked for, so that a stage that
    needs neither, as mask does, fetches no model and imports no Ray. Each gives the same object every time.
    """

    storage: Storage
    manifest: Manifest
    settings: Settings
    progress: Progress
    find_models: Callable[[], Models] = _no_models
    join_cluster: Callable[[], Workers] = _no_cluster

    @property
    def models(self) -> Models:
        """Where the models are. Raises SettingsWrong for one that is not there."""
        return self.find_models()

    @property
    def cluster(self) -> Workers:
        """Where workers run; Ray starts when resources are first asked for."""
        return self.join_cluster()

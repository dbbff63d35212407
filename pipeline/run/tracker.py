"""Optional experiment trackers: the numbers of metrics.jsonl to MLflow or Weights & Biases, through their own packages.

Where they keep a run (server, project, offline) is told to them as always: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME,
WANDB_PROJECT, WANDB_MODE and so on.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any, Protocol

from alphatoken.pipeline.run.failure import SettingsWrong

PACKAGES = {"mlflow": "mlflow", "wandb": "wandb"}


class Tracker(Protocol):
    """One run at an experiment tracker."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Send numbers, as one step."""

    def close(self, failed: bool) -> None:
        """End the run there."""


def open_tracker(kind: str, name: str, parameters: Mapping[str, Any]) -> Tracker | None:
    """The tracker of run.tracker, None for ``none``.

    ``name``: how the run is called there; ``parameters``: dotted key -> value. Raises SettingsWrong where the package is
    not installed or the tracker cannot be reached.
    """
    if kind == "none":
        return None
    try:
        module = importlib.import_module(PACKAGES[kind])
    except ImportError as error:
        raise SettingsWrong(
            [f"run.tracker={kind}: the package is not installed: pip install {PACKAGES[kind]}"]
        ) from error
    try:
        return _Mlflow(module, name, parameters) if kind == "mlflow" else _Wandb(module, name, parameters)
    except Exception as error:  # each raises its own types for a server that cannot be reached
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingsWrong([f"run.tracker={kind}: {reason}"]) from error


class _Mlflow:
    def __init__(self, mlflow: Any, name: str, parameters: Mapping[str, Any]) -> None:
        self.mlflow, self.step = mlflow, 0
        mlflow.start_run(run_name=name)
        mlflow.log_params({key: str(value)[:500] for key, value in parameters.items()})

    def log(self, metrics: Mapping[str, float]) -> None:
        named = {re.sub(r"[^\w\-. /]", "_", key): value for key, value in metrics.items()}  # what MLflow allows
        self.mlflow.log_metrics(named, step=self.step)
        self.step += 1

    def close(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


class _Wandb:
    def __init__(self, wandb: Any, name: str, parameters: Mapping[str, Any]) -> None:
        self.run = wandb.init(name=name, config=dict(parameters), job_type="alphatoken")

    def log(self, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics))

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=1 if failed else 0)

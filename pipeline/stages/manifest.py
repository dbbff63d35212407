"""run.json: what a run was told, what it depends on, and how far it is.

A stage is done when the manifest says so with the fingerprint of its present inputs. The same inputs again: the stage
is skipped, or goes on where it stopped. Other inputs: refused, with the keys that differ, unless `run.overwrite` says
to start anew.
"""

import time
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.settings import STAGES
from pipeline.stages.failure import RunFailed, SettingsWrong
from pipeline.stages.fingerprint import differences, digest
from pipeline.stages.storage import Storage

NAME = "run.json"
PACKAGES = ("alphatoken", "torch", "transformers", "tokenizers", "ray", "pyarrow", "datasets", "safetensors")
OUTPUTS = {
    "prepare": ("prepared", "quarantine"),
    "anchor": ("anchors",),
    "value": ("values", "reference"),
    "mask": ("masks",),
}


class Manifest:
    """The manifest of the run directory behind ``storage``; every change is written at once."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.content: dict[str, Any] = {"schema": 1, "versions": _versions(), "configuration": {}, "stages": {}}
        if storage.exists(NAME):
            self.content = storage.read_json(NAME)

    def stage(self, stage: str) -> dict[str, Any]:
        """The record of a stage: ``inputs``, ``fingerprint``, ``state``, ``counts``, ``seconds``; empty if never begun."""
        return self.content["stages"].get(stage, {})

    def done(self, stage: str) -> bool:
        """Whether a stage has been finished."""
        return self.stage(stage).get("state") == "done"

    def require(self, stage: str, for_stage: str) -> dict[str, Any]:
        """The record of a finished stage; raises RunFailed with the command to type when it is not finished."""
        if not self.done(stage):
            where = self.storage.root
            raise RunFailed(f"{for_stage} needs {stage}, which is not done in {where}: run `alphatoken {stage}` first")
        return self.stage(stage)

    def discard(self, first: str) -> None:
        """Forget ``first`` and every later stage and remove what they wrote (run.overwrite)."""
        for stage in STAGES[STAGES.index(first) :]:
            for directory in OUTPUTS[stage]:
                self.storage.remove(directory)
            self.content["stages"] = {k: v for k, v in self.content["stages"].items() if k.split("/")[0] != stage}
        self._write()

    def begin(self, stage: str, inputs: dict[str, Any], configuration: dict[str, Any]) -> str:
        """Start or continue a stage; returns the fingerprint of its inputs.

        ``inputs``: everything that the stage's output depends on, and nothing else. ``configuration``: the groups to
        record. Raises SettingsWrong with every differing key when the stage was begun with other inputs.
        """
        fingerprint = digest(inputs)
        record = self.stage(stage)
        if record and record["fingerprint"] != fingerprint:
            base = stage.split("/")[0]
            remedy = f"choose another run.dir, or start anew from here with run.overwrite={base}"
            if base == "mask":
                remedy = "choose another mask.name, or start the masks anew with run.overwrite=mask"
            changed = differences(record["inputs"], inputs)
            lines = [f"{stage}: {key} was {_short(old)}, now {_short(new)}" for key, old, new in changed]
            raise SettingsWrong([*lines, f"{self.storage.root} holds {stage} of other settings: {remedy}"])
        if not record:
            record = {"fingerprint": fingerprint, "inputs": inputs, "state": "running", "seconds": 0.0, "counts": {}}
        self.content["stages"][stage] = record
        self.content["configuration"].update(_plain(configuration))
        self._write()
        return fingerprint

    def note(self, stage: str, **counts: Any) -> None:
        """Record facts about a running stage, such as the frozen shard plan."""
        self.content["stages"][stage]["counts"].update(counts)
        self._write()

    def finish(self, stage: str, seconds: float, **counts: Any) -> None:
        """Mark a stage as done."""
        record = self.content["stages"][stage]
        record["counts"].update(counts)
        record["state"] = "done"
        record["seconds"] = round(record["seconds"] + seconds, 3)
        record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._write()

    def _write(self) -> None:
        self.storage.write_json(NAME, self.content)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."

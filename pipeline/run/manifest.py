"""run.json: what a run was told, what it depends on, and how far it is.

A stage is done when the manifest says so with the fingerprint of its present inputs. The same inputs again: the stage
is skipped, or goes on where it stopped. Other inputs: refused, with the keys that differ, unless `run.overwrite` says
to start anew.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.fingerprint import digest
from alphatoken.pipeline.run.mismatch import mismatch
from alphatoken.pipeline.run.redaction import without_secrets
from alphatoken.pipeline.run.remedies import first
from alphatoken.pipeline.run.storage import MANIFEST, Storage
from alphatoken.pipeline.settings import STAGES

NAME = MANIFEST
SCHEMA = 2  # 1: values/ of one method, before columns had one meaning each
PACKAGES = ("alphatoken", "torch", "transformers", "tokenizers", "ray", "pyarrow", "datasets", "safetensors")
OUTPUTS = {
    "prepare": ("prepared", "quarantine"),
    "anchor": ("anchors",),
    "value": ("values", "reference"),
    "mask": ("masks",),
    "trial": ("trial",),
}


class Manifest:
    """The manifest of the run directory behind ``storage``; every change is written at once.

    ``may_write`` raises RunFailed when another driver may write there by now. Raises RunFailed for a file that is not
    a manifest of this version.
    """

    def __init__(self, storage: Storage, may_write: Callable[[], None] = lambda: None) -> None:
        self.storage, self.may_write = storage, may_write
        self.resolved: dict[str, Any] = {}  # all settings of this command; recorded where no stage has recorded a group
        self.content: dict[str, Any] = {"schema": SCHEMA, "versions": _versions(), "configuration": {}, "stages": {}}
        if storage.exists(NAME):
            self.content = _read(storage)

    def tidy(self) -> None:
        """Finish a removal that was interrupted."""
        if "removing" in self.content:
            self._remove()

    def stage(self, stage: str) -> dict[str, Any]:
        """The record of a stage: ``inputs``, ``fingerprint``, ``state``, ``counts``, ``seconds``; empty if never begun."""
        return self.content["stages"].get(stage, {})

    def done(self, stage: str) -> bool:
        """Whether a stage has been finished."""
        return self.stage(stage).get("state") == "done"

    @property
    def pairs(self) -> bool:
        """Whether what has been prepared is of preference."""
        return self.stage("prepare").get("counts", {}).get("format") == "preference"

    def require(self, stage: str, for_stage: str) -> dict[str, Any]:
        """The record of a finished stage; raises RunFailed with the command to type when it is not finished."""
        if not self.done(stage):
            where = self.storage.root
            raise RunFailed(
                f"{for_stage} needs {stage}, which is not done in {where}: {first(self.storage.place, stage)}"
            )
        return self.stage(stage)

    def discard(self, first: str) -> None:
        """Forget ``first`` and every later stage and remove what they wrote (run.overwrite)."""
        gone = (*STAGES[STAGES.index(first) :], "trial")
        self.content["stages"] = {k: v for k, v in self.content["stages"].items() if k.split("/")[0] not in gone}
        self.content["removing"] = [directory for stage in gone for directory in OUTPUTS[stage]]
        self._write()  # first, so that no stage is ever said to be done whose files are gone
        self._remove()

    def _remove(self) -> None:
        for directory in self.content["removing"]:
            self.storage.remove(directory)
        del self.content["removing"]
        self._write()

    def begin(
        self, stage: str, inputs: dict[str, Any], configuration: dict[str, Any], about: Mapping[str, Any] | None = None
    ) -> str:
        """Start or continue a stage; returns the fingerprint of its inputs.

        ``inputs``: everything that the stage's output depends on, and nothing else. ``configuration``: the groups to
        record. ``about``: input -> what its files are, for a message in place of their fingerprints. Raises SettingsWrong
        with every differing key when the stage was begun with other inputs.
        """
        inputs = without_secrets(inputs)
        fingerprint = digest(inputs)
        record = self.stage(stage)
        if record and record["fingerprint"] != fingerprint:
            base, _, mask = stage.partition("/")
            remedy, settings = f"choose another run.dir, or start anew from here with run.overwrite={base}", NAME
            if mask:
                remedy = "choose another mask.name, or make all masks of the run anew with run.overwrite=mask"
                if self.storage.exists(f"masks/{mask}/summary.json"):
                    settings = f"masks/{mask}/summary.json"
            lines = mismatch(stage, record, inputs, without_secrets(dict(about or {})))
            own = f"; --from {self.storage.place}/{settings} starts from its own settings"
            raise SettingsWrong([*lines, f"{self.storage.root} holds {stage} of other settings: {remedy}{own}"])
        if not record:
            record = {"fingerprint": fingerprint, "inputs": inputs, "state": "running", "seconds": 0.0, "counts": {}}
            record |= {"about": without_secrets(dict(about))} if about else {}
        self.content["stages"][stage] = record
        if "data" in configuration:
            self.content["directory"] = os.getcwd()  # what relative paths of the configuration are relative to
        self.record(configuration)
        return fingerprint

    def record(self, configuration: Mapping[str, Any]) -> None:
        """Write these groups as those that the run was last asked for."""
        recorded = {**_plain(self.resolved), **self.content["configuration"], **_plain(configuration)}
        self.content["configuration"] = without_secrets(recorded)
        self._write()

    def forget(self, stage: str) -> None:
        """Let the next ``begin`` start a stage that may be done again with other inputs; its files are left to the caller."""
        if self.content["stages"].pop(stage, None) is not None:
            self._write()

    def adopt(self, stage: str, record: dict[str, Any]) -> None:
        """Take over a finished stage, whose files are here by now, from the manifest of another run."""
        self.content["stages"][stage] = record
        self._write()

    def note(self, stage: str, **counts: Any) -> None:
        """Record facts about a running stage, such as the frozen shard plan."""
        self.content["stages"][stage]["counts"].update(without_secrets(counts))
        self._write()

    def finish(self, stage: str, seconds: float, **counts: Any) -> None:
        """Mark a stage as done."""
        record = self.content["stages"][stage]
        record["counts"].update(without_secrets(counts))
        record["state"] = "done"
        record["seconds"] = round(record["seconds"] + seconds, 3)
        record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._write()

    def _write(self) -> None:
        self.may_write()
        self.storage.write_json(NAME, self.content)


def _read(storage: Storage) -> dict[str, Any]:
    try:
        content = storage.read_json(NAME)
        if isinstance(content, dict) and content["schema"] == SCHEMA and isinstance(content["stages"], dict):
            return content
        found = content.get("schema") if isinstance(content, dict) else None
        reason = f"its schema is {found}, this version of alphatoken reads {SCHEMA}"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise RunFailed(f"{storage.path(NAME)} cannot be gone on with ({reason}): choose another run.dir")


def versions_line() -> str:
    """This version, and those of the packages that decide what it computes."""
    own, *others = _versions().items()
    return f"alphatoken {own[1]} ({', '.join(f'{name} {found}' for name, found in others)})"


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

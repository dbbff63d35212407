"""`--from RUN/run.json` and `--from RUN/masks/NAME/summary.json`: what was recorded, to run it again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.manifest import NAME
from alphatoken.pipeline.run.storage import Storage

SUMMARY = "summary.json"
PLACES = (
    *[("data", name) for name in ("train", "validation", "validation_trial", "retention")], ("model", "policy"), ("model", "reference"),
)  # fmt: skip


def recorded_configuration(place: str) -> dict[str, Any]:
    """The recorded settings, as nested dictionaries; ``place``: path or URI of a run.json, or of a mask's summary.json.

    A manifest knows the mask that was made last; a mask's summary has its own settings, beside those of its run.
    run.overwrite and run.share are left out: they speak of one command. A relative path that is not there from here is taken to be
    relative to where the run was made. Raises SettingsWrong for a file that is not a manifest.
    """
    directory, _, name = place.rpartition("/")
    manifest = _read(place, Storage(directory or "."), name)
    mask = manifest.get("settings") if isinstance(manifest, dict) and name == SUMMARY else None
    if mask is not None:
        # An object store knows no "..".
        run = f"{directory or '.'}/../.." if "://" not in directory else directory.rsplit("/", 2)[0]
        manifest = _read(place, Storage(run), NAME)
    configuration = manifest.get("configuration") if isinstance(manifest, dict) else None
    if not configuration:
        raise SettingsWrong(
            [f"--from {place}: it records no configuration; give the run.json of a run, or a mask's summary.json"]
        )
    if mask is not None:
        configuration["mask"] = mask
    for key in ("overwrite", "share"):
        configuration.get("run", {}).pop(key, None)
    for group, key in PLACES:
        if configuration.get(group, {}).get(key) is not None:
            configuration[group][key] = _found(configuration[group][key], manifest.get("directory"))
    return configuration


def other_masks(place: str, recorded: Mapping[str, Any]) -> str:
    """A line about a run.json with several masks, of which it has the settings of the last one alone; else ''."""
    directory, _, name = place.rpartition("/")
    if name == SUMMARY:
        return ""
    stages = Storage(directory or ".").read_json(name).get("stages", {})
    own = recorded.get("mask", {}).get("name")
    others = sorted(stage.partition("/")[2] for stage in stages if stage.startswith("mask/"))
    others = [mask for mask in others if mask != own]
    if not others:
        return ""
    return (
        f"--from {place}: the settings of its last mask, {own}; of the others ({', '.join(others)}) with --from "
        f"{directory or '.'}/masks/NAME/{SUMMARY}"
    )


def _read(place: str, storage: Storage, name: str) -> Any:
    if not storage.exists(name):
        raise SettingsWrong([f"--from {place}: there is no such file"])
    if not name.endswith(".json"):
        raise SettingsWrong([f"--from {place}: give the run.json of a run, or the {SUMMARY} of a mask"])
    try:
        return storage.read_json(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SettingsWrong([f"--from {place}: {storage.path(name)} cannot be read as a {name}: {reason}"]) from error


def _found(value: Any, directory: str | None) -> Any:
    if isinstance(value, list):
        return [_found(one, directory) for one in value]
    if isinstance(value, dict):
        return {task: _found(rows, directory) for task, rows in value.items()}
    if not isinstance(value, str) or directory is None or os.path.exists(value):
        return value
    there = os.path.join(directory, value)
    return there if os.path.exists(there) else value

"""`--from RUN/run.json`: the configuration that a manifest recorded, to run it again."""

from __future__ import annotations

import os
from typing import Any

from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.storage import Storage

PLACES = (
    *[("data", name) for name in ("train", "validation", "validation_trial", "retention")], ("model", "policy"), ("model", "reference"),
)  # fmt: skip


def recorded_configuration(place: str) -> dict[str, Any]:
    """The recorded settings, as nested dictionaries; ``place``: path or URI of a run.json.

    run.overwrite and run.share are left out: they speak of one command. A relative path that is not there from here is taken to be
    relative to where the run was made. Raises SettingsWrong for a file that is not a manifest.
    """
    directory, _, name = place.rpartition("/")
    storage = Storage(directory or ".")
    try:
        manifest = storage.read_json(name)
    except (OSError, ValueError) as error:
        raise SettingsWrong(
            [f"--from {place}: cannot be read as a run.json: {' '.join(str(error).split())}"]
        ) from error
    configuration = manifest.get("configuration") if isinstance(manifest, dict) else None
    if not configuration:
        raise SettingsWrong([f"--from {place}: it records no configuration; give the run.json of a run"])
    for key in ("overwrite", "share"):
        configuration.get("run", {}).pop(key, None)
    for group, key in PLACES:
        if configuration.get(group, {}).get(key) is not None:
            configuration[group][key] = _found(configuration[group][key], manifest.get("directory"))
    return configuration


def _found(value: Any, directory: str | None) -> Any:
    if isinstance(value, list):
        return [_found(one, directory) for one in value]
    if isinstance(value, dict):
        return {task: _found(rows, directory) for task, rows in value.items()}
    if not isinstance(value, str) or directory is None or os.path.exists(value):
        return value
    there = os.path.join(directory, value)
    return there if os.path.exists(there) else value

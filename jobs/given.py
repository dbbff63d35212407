"""A stage takes what earlier ones made as it is: keys of those that say otherwise are refused and not ignored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from alphatoken.jobs.session import leaves
from alphatoken.pipeline.prepare.example import EMBEDDED
from alphatoken.pipeline.run.cache import cache_directory
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.redaction import without_secrets
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings.spelling import spelled

SUMMARY = "summary.json"

# Command -> the groups that it takes as they are, and what it takes.
TAKEN = {
    "anchor": (("data",), "rows"),
    "value": (("data", "anchor"), "rows and anchors"),
    "mask": (("model", "data", "anchor", "valuation"), "values"),
    "trial": (("model", "data", "anchor", "valuation"), "values"),
    "report": (("model", "data", "anchor", "valuation", "mask"), "values and masks"),
}
MADE_BY = {"data": "prepare", "anchor": "anchor"}  # group -> the stage that has recorded it, else any
LEFT_OPEN = ("data.shard_examples", "data.validation")  # recorded as what auto had become
PLACES = ("data.train", "data.validation", "data.validation_trial")


def refuse_other_settings(run: Run, overrides: Sequence[str], command: str = "mask") -> None:
    """Raise SettingsWrong for every override of a group of TAKEN whose value is not the one that the run was made with."""
    recorded, now = run.manifest.content["configuration"], without_secrets(asdict(run.settings))
    if not recorded:
        return  # nothing has been made yet, which the stage says better
    groups, what = TAKEN[command]
    directory, problems = run.manifest.content.get("directory", ""), []
    for key in dict.fromkeys(key for override in overrides for key in _keys(override, groups)):
        group = _group(key)
        if group in MADE_BY and not run.manifest.stage(MADE_BY[group]):
            continue
        if group == "mask":
            problems += _of_the_mask(run, key, _at(now, key))
            continue
        was, value = _at(recorded, key), _at(now, key)
        if value == "auto" and key in LEFT_OPEN:
            continue
        if was != value and not (key in PLACES and _there(was, directory) == _there(value, os.getcwd())):
            problems.append(
                f"{key}={spelled(value)}: {command} takes the {what} that are there, which were made with {key}={spelled(was)}; make "
                "others with `alphatoken run` in another run.dir, or with run.overwrite"
            )
    if problems:
        raise SettingsWrong(problems)


def _of_the_mask(run: Run, key: str, value: Any) -> list[str]:
    """Why a key of mask.* cannot be met by the mask of that name, which is there."""
    name = run.settings.mask.name
    place = f"masks/{name}/{SUMMARY}"
    if not run.storage.exists(place):
        return [f"mask.name={name}: there is no such mask in {run.storage.root}: make it with `alphatoken mask`"]
    was = run.storage.read_json(place)["settings"].get(key.partition(".")[2])
    if was == value or value in (None, "auto"):  # which stand for what is in the summary
        return []
    return [
        f"{key}={spelled(value)}: report shows the masks that are there, and masks/{name} was made with {key}={spelled(was)}; make another "
        "with `alphatoken mask` and its own mask.name"
    ]


def _there(place: Any, directory: str) -> Any:
    """One name for a place, wherever it is said from."""
    if isinstance(place, list | tuple):
        return [_there(one, directory) for one in place]
    if place in EMBEDDED:
        return str(cache_directory() / EMBEDDED[place])
    return os.path.abspath(os.path.join(directory, place)) if isinstance(place, str) and "://" not in place else place


def _keys(override: str, groups: Sequence[str]) -> list[str]:
    """The keys of ``groups`` that one override sets; of a group, or an experiment, those in the file of its choice."""
    key, _, value = override.lstrip("+~").partition("=")
    if "." in key:
        return [key] if _group(key) in groups else []
    file = files("alphatoken.conf").joinpath(f"{key}/{value}.yaml")
    if key not in (*groups, "experiment") or not file.is_file():
        return []
    content: Any = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    if key != "experiment":
        return list(leaves(content, f"{key}."))
    choices = [one for one in content.pop("defaults", []) if isinstance(one, dict)]  # `override /group: choice`
    of_groups = [
        k for one in choices for g, c in one.items() for k in _keys(f"{g.removeprefix('override /')}={c}", groups)
    ]
    return [*of_groups, *(k for k in leaves(content) if _group(k) in groups)]


def _group(key: str) -> str:
    return key.partition(".")[0]


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree

"""`mask` takes values as they are: keys of earlier stages that say otherwise are refused and not ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from alphatoken.jobs.session import leaves
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.redaction import without_secrets
from alphatoken.pipeline.run.run import Run

EARLIER = ("model", "data", "anchor", "valuation")


def refuse_other_settings(run: Run, overrides: Sequence[str], command: str = "mask") -> None:
    """Raise SettingsWrong for every override of a group of EARLIER whose value is not the one that the run was made with."""
    recorded, now = run.manifest.content["configuration"], without_secrets(asdict(run.settings))
    if not recorded:
        return  # nothing has been made yet, which the stage says better
    problems = []
    for key in dict.fromkeys(key for override in overrides for key in _keys(override)):
        was, value = _at(recorded, key), _at(now, key)
        if was != value:
            problems.append(
                f"{key}={value}: {command} takes the values that are there, which were made with {key}={was}; make others with "
                "`alphatoken run` in another run.dir, or with run.overwrite"
            )
    if problems:
        raise SettingsWrong(problems)


def _keys(override: str) -> list[str]:
    """The keys of EARLIER that one override sets; of a group, or an experiment, those in the file of its choice."""
    key, _, value = override.lstrip("+~").partition("=")
    if "." in key:
        return [key] if _group(key) in EARLIER else []
    file = files("alphatoken.conf").joinpath(f"{key}/{value}.yaml")
    if key not in (*EARLIER, "experiment") or not file.is_file():
        return []
    content: Any = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    if key != "experiment":
        return list(leaves(content, f"{key}."))
    choices = [one for one in content.pop("defaults", []) if isinstance(one, dict)]  # `override /group: choice`
    of_groups = [k for one in choices for g, c in one.items() for k in _keys(f"{g.removeprefix('override /')}={c}")]
    return [*of_groups, *(k for k in leaves(content) if _group(k) in EARLIER)]


def _group(key: str) -> str:
    return key.partition(".")[0]


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree

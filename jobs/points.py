"""One `-m` command line becomes points: every combination of its sweeps, each with its overrides and a name.

Sweeps are Hydra's: `key=a,b`, `key=range(0,1,0.25)`, `key=choice(a,b)`, `group=glob(*)`; the last one varies fastest.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from alphatoken.jobs.typed import as_read, legible, stray_words
from alphatoken.pipeline.run.failure import SettingsWrong

LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class Swept:
    """One swept key with the value that it has at a point, both as on the command line."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Point:
    """One combination: all overrides as Hydra takes them, and those that make it differ from the others."""

    overrides: tuple[str, ...]
    swept: tuple[Swept, ...]

    @property
    def name(self) -> str:
        """What the point is called in messages."""
        return point_name(self.swept)


def expand(overrides: Sequence[str]) -> list[Point]:
    """All points, in Hydra's order. Raises SettingsWrong for an override that cannot be read or swept over."""
    if stray := stray_words(overrides):
        raise SettingsWrong(list(dict.fromkeys(stray.values())))
    GlobalHydra.instance().clear()
    choices: dict[str, list[str]] = {}
    swept: list[str] = []
    try:
        with initialize_config_module("alphatoken.conf", version_base="1.3"):
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            for override in parser.parse_overrides(as_read(overrides)):
                key = override.get_key_element()
                choices[key] = _values(override)
                swept = [one for one in swept if one != key]  # the last of repeated keys holds
                if override.is_sweep_override():
                    swept.append(key)
    except HydraException as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "it cannot be read")
        raise SettingsWrong([legible(reason)]) from error
    if not swept:
        raise SettingsWrong(["-m without a sweep: give a key several values, such as mask.rho=0.3,0.5"])
    points = []
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        own = tuple(Swept(key, chosen[key]) for key in swept)
        points.append(Point(tuple(f"{key}={value}" for key, value in chosen.items()), own))
    return points


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        line = override.input_line
        raise SettingsWrong([f"{line}: only sweeps with a fixed list of values can be run: a,b or range() or choice()"])
    values = [str(value) for value in override.sweep_string_iterator()]
    if not values:
        raise SettingsWrong([f"{override.input_line}: the sweep is empty"])
    return values


def mask_name(point: Point, own: Sequence[Swept], given: str) -> str:
    """mask.name of the mask of a point: the swept one, else the name of ``own``, the swept keys, after what was typed."""
    if any(one.key == "mask.name" for one in point.swept):
        return given
    typed = any(override.partition("=")[0].lstrip("+") == "mask.name" for override in point.overrides)
    return f"{given}_{point_name(own)}" if typed else point_name(own)


def point_name(swept: Sequence[Swept]) -> str:
    """A name for a directory, such as ``rho-0.3_stability_weight-1.5``; different for different points.

    No ``=`` and no ``,``: readers of Parquet take `key=value` directories for columns, and Hydra wants them quoted.
    """
    last = [one.key.rpartition(".")[2] for one in swept]
    parts = []
    for one, short in zip(swept, last, strict=True):
        key = short if last.count(short) == 1 else one.key
        parts.append(f"{key}-{one.value}")
    plain = "_".join(parts)
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", plain).lstrip("-._+")
    if name != plain or len(name) > LONGEST_NAME:  # what was replaced may have been the only difference
        name = f"{name[:LONGEST_NAME].rstrip('-')}-{hashlib.sha256(plain.encode()).hexdigest()[:6]}"
    return name

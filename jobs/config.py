"""Overrides become typed settings; whatever is wrong with them is said all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alphatoken.jobs.keys import keys, texts
from alphatoken.jobs.suggestion import OWN_VALUE, near, siblings
from alphatoken.jobs.typed import as_read, legible, stray_words
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.settings import Settings


def load(overrides: Sequence[str], recorded: Mapping[str, Any] | None = None) -> Settings:
    """Compose the configuration with ``overrides`` and check it.

    ``recorded``: the configuration of a manifest, to start from instead of the defaults and groups. Raises
    SettingsWrong with every problem: wrong keys, types and groups as well as settings that do not fit together.
    """
    problems = []
    if missing := _asked_for(overrides):
        problems = [f"missing: {', '.join(sorted(missing))}"]
    stray = stray_words(overrides)
    problems += dict.fromkeys(stray.values())
    overrides = [override for place, override in enumerate(overrides) if place not in stray]
    good = as_read(overrides)
    typed = dict(zip(good, overrides, strict=True))
    composed = _compose(good, recorded)
    if isinstance(composed, str):
        alone = {override: _compose([override], recorded) for override in good}
        wrong = [f"{typed[override]}: {result}" for override, result in alone.items() if isinstance(result, str)]
        problems += wrong or [composed]
        if not wrong:
            raise SettingsWrong(problems)
        good = [override for override, result in alone.items() if not isinstance(result, str)]
        composed = _compose(good, recorded)
        if isinstance(composed, str):
            raise SettingsWrong([*problems, composed])
    problems += composed.problems()
    if problems:
        raise SettingsWrong(problems)
    return composed


def _compose(overrides: Sequence[str], recorded: Mapping[str, Any] | None) -> Settings | str:
    """The settings, or what is wrong with the overrides in one line."""
    schema = OmegaConf.structured(Settings)
    _writable(schema)
    store = ConfigStore.instance()
    store.store(name="settings", node=schema)
    root = "config"
    if recorded is not None:
        choices = [o for o in overrides if o.partition("=")[0] in groups()]
        if choices:
            return "--from starts from recorded values, not from groups: give key=value"
        root = "recorded"
        store.store(name="recorded_values", node=dict(recorded))
        store.store(name=root, node={"defaults": ["settings", "recorded_values", "_self_"]})
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("alphatoken.conf", version_base="1.3"):
            config = compose(root, overrides=list(overrides))
        missing = OmegaConf.missing_keys(config)
        if missing:
            return f"missing: {', '.join(sorted(missing))}"
        for key in ("experiment", "hydra"):
            if key in config:
                OmegaConf.set_struct(config, False)
                config.pop(key)
        unknown = sorted(set(_leaves(config)) - keys(Settings).keys())
        if unknown:  # a leading + adds keys that the types would refuse
            return "; ".join(f"{key}: {_no_such_key(key)}" for key in unknown)
        return OmegaConf.to_object(config)  # type: ignore[return-value]  # typed as any container; the schema makes it Settings
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return _reason(error, overrides)


def _asked_for(overrides: Sequence[str]) -> set[str]:
    """Keys that the chosen experiment leaves to the user (???) and that no override sets.

    Merging does not tell: ??? leaves the default of an earlier group as it is, here the embedded example.
    """
    given = dict(override.lstrip("+~").split("=", 1) for override in overrides if "=" in override)
    file = files("alphatoken.conf").joinpath(f"experiment/{given.get('experiment')}.yaml")
    if not file.is_file():
        return set()
    return OmegaConf.missing_keys(OmegaConf.create(file.read_text(encoding="utf-8"))) - given.keys()


def _writable(node: Any) -> None:
    """Frozen dataclasses become read-only nodes, which could not be overridden while they are composed."""
    OmegaConf.set_readonly(node, None)
    for child in node.values() if OmegaConf.is_dict(node) else ():
        if OmegaConf.is_config(child):
            _writable(child)


def _reason(error: BaseException, overrides: Sequence[str]) -> str:
    lines = [line.strip() for e in (error.__cause__, error) if e for line in str(e).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    key, _, value = overrides[0].lstrip("+~").partition("=") if len(overrides) == 1 else ("", "", "")
    if key in groups() and "Could not find" in text:
        own = f"; a value of your own is {OWN_VALUE[key]}={value}" if key in OWN_VALUE else ""
        return f"no such choice; choices: {', '.join(groups()[key])}{own}"
    if key and "=" in overrides[0] and key not in keys(Settings) and ("." in key or "not in 'Settings'" in text):
        return _no_such_key(key)
    if text.startswith("Ambiguous value"):
        return f"several values: -m tries each of them, {_as_one(key, value)}"
    return legible(text)


def _as_one(key: str, value: str) -> str:
    """How ``value``, which has a comma, is given as one: what the key does not take is not offered."""
    if key in texts() and not isinstance(keys(Settings)[key][0], list):
        return f"""'{key}="{value}"' is one text"""
    if not key or _taken(key, f"[{value}]"):
        return f"{key or 'KEY'}=[{value or 'A,B'}] is a list"
    point = value.replace(",", ".", 1)
    if value.startswith("0,") and _taken(key, point):
        return f"{key}={point} is a number"
    return f"{key}={value.partition(',')[0]} is one"


def _taken(key: str, value: str) -> bool:
    """Whether nothing is wrong with a value alone, beside the defaults."""
    made = _compose([f"{key}={value}"], None)
    return not isinstance(made, str) and not any(problem.startswith(f"{key}=") for problem in made.problems())


def _no_such_key(key: str) -> str:
    known = keys(Settings)
    return f"no such key{near(key, known)}{siblings(key, known)}"


def _leaves(node: Any, prefix: str = "") -> list[str]:
    found, known = [], keys(Settings)
    for key, child in node.items_ex(resolve=False):
        is_group = OmegaConf.is_dict(child) and child is not None and f"{prefix}{key}" not in known
        found += _leaves(child, f"{prefix}{key}.") if is_group else [f"{prefix}{key}"]
    return found


def groups() -> dict[str, list[str]]:
    """Configuration group -> its choices, from the packaged YAML files."""
    found = {}
    for directory in sorted(files("alphatoken.conf").iterdir(), key=lambda entry: entry.name):
        if directory.is_dir() and not directory.name.startswith("_"):
            names = [entry.name for entry in directory.iterdir() if entry.name.endswith(".yaml")]
            found[directory.name] = sorted(name.removesuffix(".yaml") for name in names)
    return found

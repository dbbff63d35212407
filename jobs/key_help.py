"""What `--help` prints: the commands, and every configuration key with its default, its unit and its meaning."""

from __future__ import annotations

from collections.abc import Mapping

from alphatoken.jobs.config import groups, keys
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.units import UNITS


def usage(commands: Mapping[str, str]) -> str:
    """``commands``: name -> one line about it."""
    lines = ["usage: alphatoken <command> [options] [key=value ...]", ""]
    lines += [f"  {name:<13}{text}" for name, text in commands.items()]
    lines += ["", "`alphatoken <command> --help` lists options and keys; without any, the embedded example is run."]
    return "\n".join(lines)


def command_help(
    command: str, text: str, synopsis: str, options: Mapping[str, str], reads_settings: bool = True
) -> str:
    """The help of one command; ``options``: flag -> one line about it."""
    lines = [f"alphatoken {command}: {text}", "", f"usage: alphatoken {command} {synopsis}".rstrip()]
    if options:
        lines += ["", "options:", *[f"  {flag:<18}{meaning}" for flag, meaning in options.items()]]
    if not reads_settings:
        return "\n".join(lines)
    lines += ["", "groups, each a set of values for the keys below (group=choice):"]
    lines += [f"  {group}={' | '.join(choices)}" for group, choices in groups().items()]
    lines += ["", "keys, with their defaults and units:"]
    for name, (default, meaning) in keys(Settings).items():
        unit = UNITS.get(name)
        lines.append(f"  {name}={_shown(default)}" + (f"   [{unit}]" if unit else ""))
        lines.append(f"      {meaning}")
    return "\n".join(lines)


def _shown(default: object) -> str:
    """A default in the spelling of the command line."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return f"[{','.join(map(str, default))}]"
    return "null" if default is None else str(default)

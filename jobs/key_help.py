"""What `--help` prints: the commands, and configuration keys with their default, unit and meaning.

Short by default: the keys that most people set. `--help --all` has every key, `--help mask.` those of one group.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence

from alphatoken.jobs.config import groups
from alphatoken.jobs.keys import keys
from alphatoken.jobs.suggestion import COMMON, near
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.units import UNITS

ALL = "--all"
INDENT = " " * 6
NOT_WRAPPED = 10_000  # columns, for what is searched in or read by a program


def usage(commands: Mapping[str, str]) -> str:
    """``commands``: name -> one line about it."""
    lines = ["usage: alphatoken <command> [options] [key=value ...]", ""]
    for name, text in commands.items():
        lines += _wrapped(text, f"  {name:<13}")
    lines += [
        "",
        *_wrapped(
            "`alphatoken <command> --help` lists options and the keys that most people set, `--help --all` every key, "
            "`--help mask.` those of one group; `alphatoken --version` says which version this is."
        ),
    ]
    lines += ["`alphatoken run` without any key runs the embedded example."]
    return "\n".join(lines)


def command_help(
    command: str, text: str, synopsis: str, options: Mapping[str, str], asked: Sequence[str], reads_settings: bool
) -> str:
    """The help of one command. ``options``: flag -> one line about it; ``asked``: what was typed beside --help.

    Raises SettingsWrong for a group that does not exist.
    """
    lines = [*_wrapped(f"alphatoken {command}: {text}"), ""]
    lines += _wrapped(f"{command} {synopsis}".rstrip(), "usage: alphatoken ")
    if options:
        lines += ["", "options:"]
        for flag, meaning in options.items():
            lines += _wrapped(meaning, f"  {flag:<18}")
    if not reads_settings:
        return "\n".join(lines)
    prefixes = [word.rstrip(".") for word in asked if not word.startswith("-") and "=" not in word]
    known = keys(Settings)
    for prefix in prefixes:
        if not _below(prefix, known):
            there = sorted({name.partition(".")[0] for name in known if "." in name})
            raise SettingsWrong(
                [f"--help {prefix}: no such group or key{near(prefix, known)}; groups: {', '.join(there)}"]
            )
    if prefixes:
        shown = {name for prefix in prefixes for name in _below(prefix, known)}
        title = f"keys of {', '.join(prefixes)}, with their defaults and units:"
    elif ALL in asked:
        shown, title = set(known), "keys, with their defaults and units:"
    else:
        shown = set(COMMON)
        title = f"the keys that most people set, with their defaults and units ({len(known)} in all: --help --all, --help mask.):"
    choices = {g: c for g, c in groups().items() if ALL in asked or g in prefixes or (not prefixes and g in _SHORT)}
    if choices:
        lines += ["", "groups, each a set of values for the keys below (group=choice):"]
        for group, names in choices.items():
            lines += _wrapped(" | ".join(names), f"  {group}=")
    lines += ["", *_wrapped(title)]
    for name, (default, meaning) in known.items():
        if name in shown:
            unit = UNITS.get(name)
            lines.append(f"  {name}={_shown(default)}" + (f"   [{unit}]" if unit else ""))
            lines += _wrapped(meaning, INDENT)
    return "\n".join(lines)


_SHORT = ("experiment", "mask", "valuation")  # groups of the short help


def _wrapped(text: str, first: str = "") -> list[str]:
    """``text`` behind ``first``, as wide as the terminal, later lines under the first letter of ``text``."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else NOT_WRAPPED
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
        break_long_words=False,
    )


def _below(prefix: str, known: Mapping[str, object]) -> list[str]:
    return [name for name in known if name == prefix or name.startswith(f"{prefix}.")]


def _shown(default: object) -> str:
    """A default in the spelling of the command line."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return f"[{','.join(map(str, default))}]"
    return "null" if default is None else str(default)

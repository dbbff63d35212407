"""The command line: `alphatoken <stage> [overrides]`. Exit status 0 done, 1 the run failed, 2 the settings are wrong."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from jobs.config import keys, load
from pipeline.settings import Settings
from pipeline.stages.failure import RunFailed, SettingsWrong
from pipeline.stages.redaction import redacted

COMMANDS = {
    "run": "every stage below, in order; skips what is already done",
    "prepare": "read, template, tokenize, validate, shard",
    "anchor": "warm-up if asked, Fisher, validation gradient, directions",
    "value": "score every response token",
    "mask": "threshold and write the trainer-ready data set",
}
LATER = ("report", "plan", "submit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    command, overrides = arguments[0], arguments[1:]
    if "-h" in overrides or "--help" in overrides:
        print(_key_help(command))
        return 0
    try:
        if command not in COMMANDS:
            known = "not available in this version" if command in LATER else "no such command"
            raise SettingsWrong([f"alphatoken {command}: {known}; commands: {', '.join(COMMANDS)}"])
        flags = [o for o in overrides if o.startswith("-")]
        if flags:
            raise SettingsWrong([f"alphatoken {command} {flag}: not available in this version" for flag in flags])
        settings = load(overrides)
    except SettingsWrong as error:
        return _wrong(error)
    return _execute(command, settings)


def _execute(command: str, settings: Settings) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from jobs.session import Session
    from pipeline.stages.progress import Progress

    try:
        with Progress() as progress, Session(settings, progress) as session:
            session.claim()
            if settings.run.overwrite:
                session.manifest.discard(settings.run.overwrite)
            importlib.import_module(f"jobs.{command}").execute(session)
    except SettingsWrong as error:
        return _wrong(error)
    except KeyboardInterrupt:
        print("alphatoken: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if settings.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        hint = "" if isinstance(error, RunFailed) else f" ({type(error).__name__}; debug=true shows where)"
        print(f"alphatoken {command}: {redacted(text)}{hint}", file=sys.stderr)
        return 1
    return 0


def _wrong(error: SettingsWrong) -> int:
    for problem in error.problems:
        print(f"alphatoken: {redacted(problem)}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = ["usage: alphatoken <command> [key=value ...]", ""]
    lines += [f"  {name:<9}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "`alphatoken <command> --help` lists the keys; without any, the embedded example is run."]
    )


def _key_help(command: str) -> str:
    lines = [f"alphatoken {command}: {COMMANDS.get(command, 'no such command')}", "", "keys, with their defaults:"]
    for name, (default, text) in keys(Settings).items():
        lines.append(f"  {name}={'null' if default is None else default}")
        lines.append(f"      {text}")
    return "\n".join(lines)

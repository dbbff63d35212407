"""The command line: `alphatoken <command> [options] [overrides]`.

Exit status 0 done, 1 the run failed, 2 the settings are wrong.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alphatoken.jobs.config import load
from alphatoken.jobs.key_help import command_help, usage
from alphatoken.jobs.suggestion import near_word
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.manifest import versions_line
from alphatoken.pipeline.run.redaction import redacted
from alphatoken.pipeline.settings import Settings

BROKEN_PIPE = 141  # as a shell counts a process that SIGPIPE has ended
SWEEP = {
    "-m": "sweep: run every combination of `key=a,b` overrides",
    "--from FILE": "start from the settings in a run.json, or in a mask's summary.json",
}
INSPECT = {
    "--row ID": "this row, by its id or its number; may be given several times",
    "--top N": "the N rows that come first (default 5)",
    "--by NAME": "in this order: affected (default: nothing kept by value, then the largest share dropped), dropped, kept, or "
    "the mean of a column of values/ over the response",
    "--changed A,B": "rows that two masks decide most differently",
    "--mask A,B,...": "these masks, under each other (default: all, at most 4)",
    "--colour NAME": "colour by this column (default: that of --by, else what the first mask decides by)",
    "--values": "also every response token with its numbers",
    "--whole": "do not shorten long rows",
}


@dataclass(frozen=True, slots=True)
class Command:
    """``kind``: stage (runs in a session, can be swept) | tool (its module takes the arguments). ``module``: of jobs, where it
    is not called as the command; ``needs_run``: whether it works on a run directory that is there; ``reads_settings``: whether
    keys mean anything to it.
    """

    text: str
    kind: str = "stage"
    synopsis: str = "[options] [key=value ...]"
    options: Mapping[str, str] = field(default_factory=lambda: SWEEP)
    module: str = ""
    needs_run: bool = False
    reads_settings: bool = True


COMMANDS = {
    "run": Command("every stage below, in order; skips what is already done"),
    "prepare": Command("read, template, tokenize, validate, shard"),
    "anchor": Command("warm-up if asked, Fisher, validation gradient, directions", needs_run=True),
    "value": Command("score every response token", needs_run=True),
    "mask": Command(
        "threshold and write the trainer-ready data set; made for sweeps (-m)",
        options={**SWEEP, "--csv FILE": "write the table of the sweep, one mask a line, with its settings"}, needs_run=True,
    ),
    "trial": Command(
        "does a mask help on this model and data: short fine-tunes, a table, one sentence", "stage",
        "[options] [trial.masks=NAME,...] [trial.rho=0.5,0.7] [mask.KEY=a,b ...] [key=value ...]",
        {"--from FILE": "start from the settings in a run.json; default: those of run.dir"}, needs_run=True,
    ),
    "report": Command("one self-contained HTML page about a run", needs_run=True),
    "inspect": Command(
        "rows with their values in the terminal, kept and dropped tokens apart", "tool",
        "RUN [--row ID | --top 20 --by information | --changed default,paper]", INSPECT, reads_settings=False,
    ),
    "plan": Command(
        "what a run would cost and what it would skip; loads no weights, starts no worker", "tool",
        options={
            "--measure": "load the model and time a few batches here, in about a minute; kept for later plans",
            "--json": "print the plan as JSON", "--from FILE": SWEEP["--from FILE"],
        },
    ),
    "submit": Command(
        "run a stage as a job on a Ray cluster", "tool", "<stage> [options] [key=value ...]",
        {"--no-wait": "print the job's id and return at once", **SWEEP},
    ),
    "export": Command(
        "a mask in the shape that another trainer reads", "tool", "RUN --mask NAME --to FORMAT [--out PATH]",
        {
            "--mask NAME": "which mask of the run; default: default",
            "--to FORMAT": "hf | jsonl | shifted | loss_mask | olmo (docs/trainers.md)",
            "--out PATH": "what to write: a file for jsonl, a directory for the others; default: in RUN/export; must not be there",
        },
        reads_settings=False,
    ),
    "check-batch": Command(
        "does a batch that a trainer made train on what the mask keeps", "tool", "RUN --mask NAME FILE ...",
        {
            "--mask NAME": "which mask of the run; default: default",
            "--shifted": "labels have to stand at the predicting position, for a trainer that does not shift",
        },
        module="check_batch", reads_settings=False,
    ),
    "status": Command("how a submitted job is", "tool", "<job id> [cluster.dashboard=http://host:8265]", {}),
    "stop": Command("stop a submitted job", "tool", "<job id> [cluster.dashboard=http://host:8265]", {}),
    "config": Command(
        "the settings that a command line comes to, as YAML", "tool", options={"--from FILE": SWEEP["--from FILE"]},
        module="show_config",
    ),
    "completion": Command(
        "a script for the shell: source <(alphatoken completion bash)", "tool", "bash | zsh | fish", {}, reads_settings=False
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arguments:
    """A command line taken apart."""

    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()  # -m as --multirun
    recorded: dict[str, Any] | None = None  # of --from
    csv: str | None = None  # where the table of a sweep goes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    texts = {name: command.text for name, command in COMMANDS.items()}
    if not arguments or arguments[0] in ("-h", "--help"):
        return _printed(usage(texts), 0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        return _printed(versions_line(), 0)
    command = COMMANDS.get(name)
    if command is None:
        meant = near_word(name, COMMANDS)
        return _wrong(SettingsWrong([f"alphatoken {name}: no such command{meant}; commands: {', '.join(COMMANDS)}"]))
    debug = "debug=true" in [argument.lower() for argument in rest]
    try:
        if "-h" in rest or "--help" in rest:
            told = command_help(name, command.text, command.synopsis, command.options, rest, command.reads_settings)
            return _printed(told, 0)
        if command.kind == "tool":
            return importlib.import_module(f"{__package__}.{command.module or name}").execute(rest)
        parsed = parse(name, rest, command.options)
        if "--multirun" in parsed.flags:
            return _sweep(name, parsed)
        settings = settings_of(name, parsed)
        debug = settings.debug
        _run(name, settings, parsed.overrides)
    except SettingsWrong as error:
        return _wrong(error)
    except KeyboardInterrupt:
        print("alphatoken: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _unread()
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        hint = "" if isinstance(error, RunFailed) else f" ({type(error).__name__}; debug=true shows where)"
        print(f"alphatoken {name}: {redacted(text)}{hint}", file=sys.stderr)
        return 1
    return 0


def _printed(text: str, status: int) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        return _unread()
    return status


def _unread() -> int:
    """Whoever read stdout has seen enough (`| head`): nothing more is written, not at the end of the interpreter either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def settings_of(name: str, parsed: Arguments) -> Settings:
    """Composed from the overrides; of a trial from what the run recorded, but for masks, which may be swept over."""
    if name != "trial":
        return load(parsed.overrides, parsed.recorded)
    from alphatoken.jobs.trial import of_the_run

    return of_the_run(parsed.overrides, parsed.recorded)


def parse(name: str, arguments: Sequence[str], options: Mapping[str, str]) -> Arguments:
    """Tell options from overrides. Raises SettingsWrong for an option that the command does not have."""
    overrides: list[str] = []
    flags: list[str] = []
    recorded = table = None
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        option, equals, value = argument.partition("=")
        if option == "--from" and "--from FILE" in options:
            if not equals and not waiting:
                raise SettingsWrong([f"alphatoken {name} --from: give the run.json to start from"])
            from alphatoken.jobs.replay import other_masks, recorded_configuration

            place = value if equals else waiting.pop(0)
            recorded = recorded_configuration(place)
            if said := other_masks(place, recorded):
                print(said, file=sys.stderr)
        elif option == "--csv" and "--csv FILE" in options:
            if not value and not waiting:
                raise SettingsWrong([f"alphatoken {name} --csv: give the file to write"])
            table = value if equals else waiting.pop(0)
        elif argument in ("-m", "--multirun") and "-m" in options:
            flags.append("--multirun")
        elif argument.startswith("-") and argument in options:
            flags.append(argument)
        elif argument.startswith("-"):
            known = ", ".join(options) or "none"
            meant = near_word(option, [flag.partition(" ")[0] for flag in options])
            bare = argument.lstrip("-")
            if not meant and "." in bare:
                meant = f"; settings are given without dashes: {bare if equals else f'{bare}=...'}"
            raise SettingsWrong([f"alphatoken {name} {argument}: no such option{meant}; options: {known}, --help"])
        else:
            overrides.append(argument)
    if table is not None and "--multirun" not in flags:
        raise SettingsWrong(
            [f"alphatoken {name} --csv {table}: it is the table of a sweep: give -m, and keys with several values"]
        )
    return Arguments(tuple(overrides), tuple(flags), recorded, table)


def quiet(level: str) -> None:
    """What libraries say: warnings and more with log_level=debug, else next to nothing."""
    if level == "debug":
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if level == "debug" else "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "datasets" in sys.modules:  # it reads the variable when it is imported
        sys.modules["datasets"].disable_progress_bars()


def _run(name: str, settings: Settings, overrides: Sequence[str]) -> None:
    quiet(settings.log_level)
    from alphatoken.jobs.session import Session
    from alphatoken.pipeline.run.progress import Progress

    with Progress(level=settings.log_level) as progress, Session(settings, progress, overrides) as session:
        if COMMANDS[name].needs_run:
            session.require_run()
        session.claim()
        if settings.run.overwrite:
            from alphatoken.jobs.start_anew import start_anew

            start_anew(name, session)
        try:
            if settings.run.share and name not in ("mask", "report"):
                session.share()
            importlib.import_module(f"{__package__}.{name}").execute(session)
        except SettingsWrong:
            raise  # no worker has to do with it
        except Exception:
            if session.storage.exists("logs"):
                progress.say(f"worker logs: {session.storage.shown('logs')}")
            raise


def _sweep(name: str, parsed: Arguments) -> int:
    """Run all points; 1 where any failed."""
    from alphatoken.jobs.sweep import compared_masks, print_comparison, print_failures, run_sweep, sweep_points
    from alphatoken.jobs.sweep_csv import require_place, write_csv

    if name == "report":
        raise SettingsWrong(["alphatoken report -m: a report is about one run; give its run.dir"])
    points, failures = sweep_points(parsed.overrides, parsed.recorded)
    if parsed.csv:
        require_place(parsed.csv)
    level = points[0].settings.log_level
    quiet(level)
    from alphatoken.pipeline.run.progress import Progress

    with Progress(level=level) as progress:
        failures += run_sweep(name, points, progress)
    if name in ("run", "mask"):
        found = compared_masks(points, failures)
        if found:
            print_comparison(found)
        if parsed.csv:
            write_csv(parsed.csv, found, failures)
    print_failures(name, len(points) + sum(f.name not in {p.name for p in points} for f in failures), failures)
    return 1 if failures else 0


def _wrong(error: SettingsWrong) -> int:
    for problem in error.problems:
        print(f"alphatoken: {redacted(problem)}", file=sys.stderr)
    return 2

"""Arguments of commands that take paths and options with values, and no keys."""

from __future__ import annotations

import argparse
from typing import NoReturn

from alphatoken.jobs.suggestion import near_word
from alphatoken.pipeline.run.failure import SettingsWrong


class ToolArguments(argparse.ArgumentParser):
    """An argument parser whose errors are settings that are wrong, one line, and whose help is the command line's own."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"alphatoken {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise SettingsWrong instead of leaving the process; an option that does not exist is answered with those that do."""
        known = [flag for action in self._actions for flag in action.option_strings[:1]]
        unknown = message.removeprefix("unrecognized arguments: ")
        if known and unknown != message and unknown.startswith("-"):
            word = unknown.split(maxsplit=1)[0].partition("=")[0]
            message += f"{near_word(word, known)}; options: {', '.join(known)}"
        raise SettingsWrong([f"{self.prog}: {message} (--help shows how)"])

"""alphatoken completion: a script that makes the shell complete commands, keys and choices.

The words stand in the script, so that completing starts no Python.
"""

from __future__ import annotations

from collections.abc import Sequence

from alphatoken.jobs.cli import COMMANDS
from alphatoken.jobs.config import groups, keys
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.settings import Settings

# In bash `=` begins a word; what is completed here is the whole of key=value, and what bash has taken already is cut off.
BASH = """\
_alphatoken() {
    local line="${COMP_LINE:0:COMP_POINT}" words cut
    local typed="${line##*[[:space:]]}"
    if [ "$COMP_CWORD" -le 1 ]; then words="@COMMANDS@ --help --version"; else words="@WORDS@"; fi
    COMPREPLY=($(compgen -W "$words" -- "$typed"))
    case "$typed" in
        *=*) if [ "${#COMPREPLY[@]}" -eq 0 ]; then COMPREPLY=($(compgen -f -P "${typed%%=*}=" -- "${typed#*=}")); fi
             case "$COMP_WORDBREAKS" in *=*) cut="${typed%"${typed##*=}"}"; COMPREPLY=("${COMPREPLY[@]#"$cut"}") ;; esac ;;
    esac
    case "${COMPREPLY[0]}" in *=|*.) compopt -o nospace 2>/dev/null ;; esac
}
complete -F _alphatoken alphatoken
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
FISH = """\
complete -c alphatoken -n __fish_use_subcommand -f -a "@COMMANDS@"
complete -c alphatoken -n "not __fish_use_subcommand" -a "@WORDS@"
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH + BASH, "fish": FISH}


def execute(arguments: Sequence[str]) -> int:
    """Print the script of one shell. Raises SettingsWrong for another one."""
    shells = [argument for argument in arguments if argument in SCRIPTS]
    if len(arguments) != 1 or not shells:
        raise SettingsWrong([f"alphatoken completion: give one of {', '.join(SCRIPTS)}"])
    print(script(shells[0]), end="")
    return 0


def script(shell: str) -> str:
    """The script with every command, key and choice of a group in it."""
    words = [f"{group}={choice}" for group, choices in groups().items() for choice in choices]
    words += [f"{key}=" for key in keys(Settings)] + ["--help", "--all", "--from"]
    return SCRIPTS[shell].replace("@COMMANDS@", " ".join(COMMANDS)).replace("@WORDS@", " ".join(words))

"""alphatoken completion: a script that makes the shell complete commands, keys and choices.

The words stand in the script, so that completing starts no Python.
"""

from __future__ import annotations

from collections.abc import Sequence

from alphatoken.jobs.cli import COMMANDS
from alphatoken.jobs.config import groups
from alphatoken.jobs.keys import keys
from alphatoken.jobs.tool_arguments import ToolArguments

# In bash `=` begins a word; what is completed here is the whole of key=value, and what bash has taken already is cut off.
BASH = """\
_alphatoken() {
    local line="${COMP_LINE:0:COMP_POINT}" words cut
    local typed="${line##*[[:space:]]}"
    local keys="@KEYS@"
    if [ "$COMP_CWORD" -le 1 ]; then words="@COMMANDS@ --help --version"; else
        case "${COMP_WORDS[1]}" in
@CASES@
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$typed"))
    case "$typed" in
        *=*) if [ "${#COMPREPLY[@]}" -eq 0 ]; then COMPREPLY=($(compgen -f -P "${typed%%=*}=" -- "${typed#*=}")); fi
             case "$COMP_WORDBREAKS" in *=*) cut="${typed%"${typed##*=}"}"; COMPREPLY=("${COMPREPLY[@]#"$cut"}") ;; esac ;;
    esac
    case "${COMPREPLY[0]}" in *=|*.) compopt -o nospace 2>/dev/null ;; esac
}
complete -o bashdefault -o default -F _alphatoken alphatoken
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
FISH = """\
complete -c alphatoken -n __fish_use_subcommand -f -a "@COMMANDS@"
@CASES@
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH + BASH, "fish": FISH}
BASH_CASE = '            %s) words="%s" ;;'
FISH_CASE = 'complete -c alphatoken -n "__fish_seen_subcommand_from %s" -a "%s"'


def parser() -> ToolArguments:
    """What the command takes."""
    parser = ToolArguments("completion")
    parser.add_argument("shell", choices=list(SCRIPTS))
    return parser


def execute(arguments: Sequence[str]) -> int:
    """Print the script of one shell. Raises SettingsWrong for another one."""
    print(script(parser().parse_args(list(arguments)).shell), end="")
    return 0


def script(shell: str) -> str:
    """The script with every command in it, the options of each, and where settings mean something their keys and choices."""
    words = [f"{group}={choice}" for group, choices in groups().items() for choice in choices]
    every = " ".join([*words, *(f"{key}=" for key in keys())])
    case, known = (FISH_CASE, every) if shell == "fish" else (BASH_CASE, "$keys")
    cases = [case % (name, " ".join(_of(name) + [known] * COMMANDS[name].reads_settings)) for name in COMMANDS]
    filled = SCRIPTS[shell].replace("@COMMANDS@", " ".join(COMMANDS)).replace("@KEYS@", every)
    return filled.replace("@CASES@", "\n".join(cases))


def _of(name: str) -> list[str]:
    """The options of one command, and the words that it takes."""
    command = COMMANDS[name]
    own = [flag.partition(" ")[0] for flag in command.options]
    stages = [other for other, one in COMMANDS.items() if one.kind == "stage"] if name == "submit" else []
    shells = list(SCRIPTS) if name == "completion" else []
    return [*own, "--help", *["--all"] * command.reads_settings, *stages, *shells]

"""Completion of our command lines in bash and zsh: `python -m docs.completion` writes
completion.bash, from what every command's --help says.
"""

import contextlib
import importlib
import io
import os
import re
from pathlib import Path
from unittest import mock

SCRIPT = Path(__file__).resolve().with_name("completion.bash")
COMMANDS = (
    *("train.run", "train.predict", "train.evaluate", "train.compare", "train.export"),
    *("train.study", "train.lr_find", "train.data.check", "train.data.pack"),
    *("train.doctor", "train.doctor.bench"),
    *("profiling.suite", "profiling.speed", "profiling.kernel_speed", "profiling.data_speed"),
    *("profiling.predict_speed", "profiling.nsys", "profiling.train_profile"),
    *("profiling.compare", "profiling.report", "profiling.aot", "profiling.counts"),
    *("profiling.scaling", "profiling.nvtx_cost", "profiling.window", "profiling.roofline"),
)
FLAG = re.compile(r"[│ ]*(?:-\w, )?(--\w[\w-]*)(?:, (--no-[\w-]+))?(?: \{([\w,]+)\}(?!\|))?")
BASH = """\
# Completes `python -m train.run --mo<TAB>` and all other commands of Lapis:
#     source docs/completion.bash
# zsh wants this first: autoload -U compinit bashcompinit && compinit && bashcompinit
# Written by: python -m docs.completion
_lapis() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
  local command="" words="" flag="" i
  if [[ $word == --*=* ]]; then # --flag=value is one word for zsh, three for bash
    before=${{word%%=*}} flag=${{word%%=*}}= word=${{word#*=}}
  elif [[ $word == "=" ]]; then
    word=""
  elif [[ $before == "=" ]]; then
    before=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  for ((i = 2; i < COMP_CWORD; i++)); do
    if [[ ${{COMP_WORDS[i]}} == "--" ]]; then
      command=train.run # whose flags the profilers hand on
    elif [[ ${{COMP_WORDS[i-1]}} == "-m" && -z $command ]]; then
      command=${{COMP_WORDS[i]}}
    fi
  done
  if [[ $before == "-m" ]]; then
    words="{commands}"
  else
    case "$command $before" in
{choices}
      *) if [[ $word == -* ]]; then
        case $command in
{flags}
        esac
      fi ;;
    esac
  fi
  COMPREPLY=($(compgen -P "$flag" -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _lapis python python3 torchrun
"""


def module_of(command: str) -> str:
    """The module whose `main` a command runs."""
    inside = {"train.study": "train.study.command"}
    packages = ("train.doctor", "train.doctor.bench")
    return f"{command}.__main__" if command in packages else inside.get(command, command)


def help_of(command: str) -> str:
    """What a command's --help says, on lines of 100 characters."""
    said = io.StringIO()
    narrow = mock.patch.dict(os.environ, {"COLUMNS": "100"})
    with narrow, contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(module_of(command)).main(["--help"])
    return said.getvalue()


def flags_of(command: str) -> dict[str, list[str]]:
    """The flags of a command, each with the values it can have where they are few."""
    found = [match for line in help_of(command).splitlines() if (match := FLAG.match(line))]
    flags = {}
    for flag, opposite, choices in (match.groups() for match in found):
        flags[flag] = [value for value in (choices or "").split(",") if value not in ("", "None")]
        if opposite:
            flags[opposite] = []
    return flags


def script() -> str:
    """What completion.bash should hold."""
    flags = {command: flags_of(command) for command in COMMANDS}
    flags["train.study"] = flags["train.run"] | flags["train.study"]  # it hands the others on
    choices = [
        f'      "{command} {flag}") words="{" ".join(values)}" ;;'
        for command, own in flags.items()
        for flag, values in own.items()
        if values
    ]
    lines = [f'          {command}) words="{" ".join(own)}" ;;' for command, own in flags.items()]
    return BASH.format(
        commands=" ".join(COMMANDS), choices="\n".join(choices), flags="\n".join(lines)
    )


if __name__ == "__main__":
    SCRIPT.write_text(script(), encoding="utf-8")

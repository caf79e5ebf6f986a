"""Shell completion: the written script is current and knows every command, flag and choice."""

import shutil
import subprocess

import pytest

from docs import completion
from models import MODELS
from tests.test_portable import COMMANDS
from train import flags

SCRIPT = completion.SCRIPT
INSIDE = {"train.study.child"}  # started by other commands, not by people
ZSH = "autoload -U compinit bashcompinit && compinit -D && bashcompinit; setopt ksharrays;"


def completed(shell: str, *words: str) -> list[str]:
    """What `shell` offers for the last of `words`."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    begin = ZSH if shell == "zsh" else ""  # which counts from 0 where it completes as bash does
    code = f'{begin} source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _lapis'
    done = subprocess.run(
        [shell, "-c", f"{code}; printf '%s\\n' \"${{COMPREPLY[@]}}\"", str(SCRIPT), *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    # zsh itself leaves out what does not begin with the word
    return [one for one in done.stdout.split() if shell == "bash" or one.startswith(words[-1])]


def test_every_command_is_completed_and_the_script_is_current():
    assert {*completion.COMMANDS} == {*COMMANDS, "train.study"} - INSIDE
    assert SCRIPT.read_text() == completion.script(), "run python -m docs.completion"


def test_every_flag_of_the_training_is_found_in_its_help():
    assert {*completion.flags_of("train.run")} - {"--help"} == {f"--{n}" for n in flags.names()}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_commands_flags_and_values(shell):
    assert completed(shell, "python", "-m", "train.r") == ["train.run"]
    assert completed(shell, "python3", "-m", "train.run", "--mo") == ["--model", "--momentum"]
    assert completed(shell, "python", "-m", "train.run", "--model", "") == [*MODELS]
    three = completed(shell, "python", "-m", "train.run", "--model", "=", "plain3")
    one = completed(shell, "python", "-m", "train.run", "--model=plain3")
    assert (three, one) == (["plain34"], ["--model=plain34"])
    assert "--fused" in completed(shell, "python", "-m", "profiling.nsys", "--", "--f")
    assert completed(shell, "python", "-m", "train.study", "--see") == ["--seed", "--seeds"]
    torchrun = completed(shell, "torchrun", "--nproc-per-node", "2", "-m", "train.run", "--sync")
    assert torchrun == ["--sync-bn"]


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "train.predict", "--checkpoint", "r"),  # a path
        ("-m", "http.server", "--"),
        ("script.py", "--"),
        ("-m", "train.run", "--out", ""),
    ],
)
def test_what_is_not_ours_is_left_to_the_shell(words):
    assert completed("bash", "python", *words) == []

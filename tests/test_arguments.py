"""Command lines: their help reads well, and what is wrong in them is said in one sentence."""

import dataclasses
import importlib
import itertools
import re

import pytest

from docs.completion import COMMANDS, module_of
from train import config, export, lr_find, predict
from train.arguments import Parser, flowing, no_flag


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_its_command_says_something_of_every_flag_and_has_no_colours(
    command, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module_of(command)).main(["--help"])
    assert end.value.code in (0, None)
    text = capsys.readouterr().out
    assert re.match(rf"usage: python -m {re.escape(command)} ", text)
    assert "\x1b" not in text
    lines = [*text.splitlines(), ""]
    for flag, below in itertools.pairwise(lines):
        if re.fullmatch(r"  --\w[\w-]+( [\w.]+)? *", flag):
            assert below.startswith(8 * " "), f"{flag} has no help"


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (predict.main, ["--chekpoint", "x"], "--chekpoint is no flag: did you mean --checkpoint?"),
        (predict.main, ["--checkpoint", "x", "--topk=1"], "--topk=1 is no flag: did you mean "),
        (predict.main, ["a.jpg"], "the following arguments are required: --checkpoint; python -m "),
        (
            export.main,
            ["--checkpoint", "x", "--format", "onx"],
            "argument --format: invalid ",
        ),
        (lr_find.main, ["--epoch", "2"], "--epoch is no flag: did you mean --epochs?"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(main, words, said, capsys):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_a_word_behind_two_dashes_is_no_flag(capsys):
    parser = Parser("train.predict", "text")
    parser.add_argument("photos", nargs="*")
    assert parser.parse_args(["--", "--a.jpg"]).photos == ["--a.jpg"]


def test_near_flags_and_those_of_other_programs():
    assert no_flag("--epoch=3", ["epochs"]) == "--epoch=3 is no flag: did you mean --epochs?"
    assert no_flag("--arch", ["model"], {"arch": "model"}).endswith("--model?")
    assert no_flag("--zzz", ["model"]) == "--zzz is no flag: --help names all"


def test_help_flows_over_the_lines_of_its_source():
    @flowing
    @dataclasses.dataclass
    class Options:
        first: int = 0
        """One line
        and another."""
        second: int = 1

    first, second = dataclasses.fields(Options)
    assert first.metadata["help"] == "One line and another."
    assert "help" not in second.metadata
    for group in (config.ModelConfig, config.DataConfig, config.OptimConfig, config.RunConfig):
        for field in dataclasses.fields(group):
            assert field.metadata["help"].endswith((".", ")")), field.name

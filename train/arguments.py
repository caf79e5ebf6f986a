"""What the command lines of all programs share: help that reads well, and what a word that is no
flag may have meant."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, takewhile
from types import MappingProxyType
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse for `python -m COMMAND`: `text` keeps its lines, flags are written out, and what is
    wrong is said in one sentence, with the flag that may have been meant."""

    def __init__(self, command: str, text: str):
        super().__init__(
            prog=f"python -m {command}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    @property
    def flags(self) -> list[str]:
        """The names of all flags, without their dashes."""
        return [name.lstrip("-") for name in self._option_string_actions]

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else list(args)
        for word in takewhile("--".__ne__, words):  # ahead of what is required and missing
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                self.exit(2, f"error: {no_flag(word, self.flags)}\n")
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help names all flags\n")


def no_flag(word: str, names: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """What to say of a word that is no flag, with the nearest of the flags `names`; `elsewhere`: by
    what other programs call it, the flag that is meant."""
    meant = {name: name for name in names} | dict(elsewhere or {})
    given = word.lstrip("-").partition("=")[0].replace("_", "-")
    near = difflib.get_close_matches(given, meant, n=1)
    cure = f"did you mean --{meant[near[0]]}?" if near else "--help names all"
    return f"{word} is no flag: {cure}"


def flowing(options: type) -> type:
    """A dataclass of options whose help, the string under each field, flows over the lines of the
    terminal; tyro would keep the line breaks of the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(options))).body[0].body
    fields = {field.name: field for field in dataclasses.fields(options)}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            flow = " ".join(ast.literal_eval(text.value).split())
            fields[field.target.id].metadata = MappingProxyType({"help": flow})
    return options

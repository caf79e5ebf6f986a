"""The exact command that a remedy comes down to."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from train.config import Config, from_dict, recipe_of
from train.errors import UsageError

OWN = ("out", "resume", "debug")  # of the run that was, not of the next
# Of a network that starts from random weights: loaded ones would not fit, or bring the fault along
ANEW = {"model", "stem", "norm", "init"}


def command_with(config: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> str | None:
    """The command that runs `config` (as `to_dict` has it) again with `changes` to its fields, in
    the shortest form; None where there is nothing to change. Raises KeyError for no field."""
    if not changes or config is None:
        return None
    before = from_dict(config)
    changes, groups = dict(changes), {}
    if ANEW & changes.keys():
        changes["init_from"] = None
    for group in dataclasses.fields(Config):
        value = getattr(before, group.name)
        names = {field.name for field in dataclasses.fields(value)}
        own = {name: changes.pop(name) for name in names & changes.keys()}
        groups[group.name] = dataclasses.replace(value, **own)
    if changes:
        raise KeyError(f"no flag sets {', '.join(changes)}")
    after = Config(**groups)
    return None if after == before else command_of(after)


def command_of(config: Config) -> str:
    """The shortest `python -m train.run` command that parses to `config`.

    Raises UsageError for a value that no flag can give.
    """
    recipe = recipe_of(config.run.recipe, config.model.model)
    words = ["python", "-m", "train.run"]
    if config.run.recipe != "default":
        words += ["--recipe", config.run.recipe]
    for group in dataclasses.fields(Config):
        given, usual = getattr(config, group.name), getattr(recipe, group.name)
        for field in dataclasses.fields(given):
            value = getattr(given, field.name)
            if value != getattr(usual, field.name) and field.name not in (*OWN, "recipe"):
                words += _flag(field.name, value)
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None:
        raise UsageError(f"{flag} has a default that cannot be given by hand: leave it out")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    values = value if isinstance(value, tuple) else (value,)
    return [flag, *map(str, values)]

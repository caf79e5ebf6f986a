"""The command line of `train.run`: flags on top of a recipe, or of another run's config.json."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import tyro

from models import MODELS
from train import checkpoint, distributed
from train.arguments import flowing, no_flag
from train.config import DEFAULT, RECIPES, Config, check, from_dict, recipe_of, to_dict
from train.errors import CheckpointError, UsageError
from train.record import opened

OF_ITS_RUN = ("out", "resume")  # what a config.json says of its own run alone
# what other programs call a flag of ours
ELSEWHERE = {
    "arch": "model",
    "learning-rate": "lr",
    "network": "model",
    "num-epochs": "epochs",
    "num-workers": "workers",
    "output": "out",
}


@flowing
@dataclass(frozen=True)
class Flags(Config):
    """A configuration, and the flags that are none of its values."""

    config: Path | None = None
    """Take the config.json of another run as the defaults, in place of a recipe's."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the complete configuration as JSON, as config.json holds it, and do not train."""


def parse(
    argv: Sequence[str],
    command: str = "train.run",
    text: str = "Train a plain or residual network on a folder of photos.",
) -> Config:
    """The configuration the flags describe, on top of their recipe or --config, or the one --resume
    names. command, text: what --help says is run, and does.

    Raises UsageError for flags that do not exist and combinations that cannot work; unknown values
    end in exit 2, --help and, once it has printed, --print-config in exit 0.
    """
    recipe, file = _given(argv, "--recipe"), _given(argv, "--config")
    if recipe is not None and file is not None:
        raise UsageError("--config takes the place of --recipe: leave one out")
    if file is not None:
        base = read_config(Path(file))
    else:  # what is unknown, the parser says
        model = _given(argv, "--model")
        name = recipe if recipe in RECIPES else "default"
        base = recipe_of(name, model if model in MODELS else DEFAULT.model.model)
    flags, unknown = tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Flags),
        prog=f"python -m {command}",
        description=text,
        default=Flags(**vars(base)),
        args=argv,
        return_unknown_args=True,
    )
    if unknown:
        raise UsageError(no_flag(unknown[0], names(), ELSEWHERE))
    config = Config(flags.model, flags.data, flags.optim, flags.run)
    out = config.run.out
    if config.run.resume is not None:
        config = _resumed(config, argv)
    elif distributed.may_restart() and out is None:
        raise UsageError(
            "torchrun --max-restarts goes on in the run's folder, which has to be known: add "
            "--out FOLDER"
        )
    elif distributed.restarted() and (out / "config.json").exists():
        config = _resumed(replace(config, run=replace(config.run, resume=out)), [])
    else:
        check(config)
    if flags.print_config:
        print(json.dumps(to_dict(config), indent=2, ensure_ascii=False))
        raise SystemExit(0)
    return config


def read_config(path: Path) -> Config:
    """What a run's config.json says, but for its command, its folder and what it resumed; what it
    does not name has its default. Raises UsageError."""
    try:
        values = opened(json.loads(path.read_bytes()))
    except OSError as error:
        raise UsageError(
            f"--config {path} cannot be read ({error.strerror}): name the config.json of a run"
        ) from error
    except ValueError as error:
        problem = f"--config {path} is no JSON ({error})"
        raise UsageError(f"{problem}: name the config.json of a run") from error
    groups = {group.name: group.type for group in dataclasses.fields(Config)}
    if not isinstance(values, dict) or not all(isinstance(values.get(g, {}), dict) for g in groups):
        raise _foreign(path, f"it is no mapping of {', '.join(groups)}")
    if unknown := set(values) - {*groups, "command"}:
        raise _foreign(path, f"it has the unknown field {min(unknown)}")
    given = {name: dict(values.get(name, {})) for name in groups}
    for name, group in groups.items():
        if unknown := set(given[name]) - {field.name for field in dataclasses.fields(group)}:
            raise _foreign(path, f"it has the unknown field {name}.{min(unknown)}")
    for name in OF_ITS_RUN:
        given["run"].pop(name, None)
    try:
        return from_dict(given, f"--config {path}")
    except CheckpointError as error:
        raise UsageError(str(error)) from error


def _foreign(path: Path, reason: str) -> UsageError:
    return UsageError(f"--config {path} is no config.json of this version: {reason}")


def _given(argv: Sequence[str], flag: str) -> str | None:
    """The value that `argv` gives a flag, which has to be known before the others are read."""
    value = None
    for word, following in zip_longest(argv, argv[1:]):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


def names() -> list[str]:
    """The names of all flags, without their dashes."""
    fields = [f for group in dataclasses.fields(Config) for f in dataclasses.fields(group.type)]
    names = ["config", "print-config", *(field.name.replace("_", "-") for field in fields)]
    return names + [f"no-{field.name.replace('_', '-')}" for field in fields if field.type is bool]


def _resumed(config: Config, argv: Sequence[str]) -> Config:
    allowed = {"--resume", "--threads", "--debug", "--workers", "--print-config"}
    others = [w.split("=")[0] for w in argv if w.startswith("--")]
    extra = [flag for flag in others if flag not in allowed]
    if extra:
        raise UsageError(
            f"--resume takes its settings from the run's config.json: leave out {extra[0]}"
        )
    folder = config.run.resume
    state, path = checkpoint.load_newest(folder / "checkpoints")
    old = from_dict(state.get("config"), path)
    threads = old.run.threads if config.run.threads is None else config.run.threads
    run = replace(old.run, resume=folder, out=folder, threads=threads, debug=config.run.debug)
    data = (
        old.data if config.data.workers is None else replace(old.data, workers=config.data.workers)
    )
    return replace(old, run=run, data=data)

"""Several models, trained alike and compared: `python -m train.study --data PATH --out DIR`.

Every model is trained with the same seeds, and a seed means the same split, order and augmentation
for all of them. Flags that are not the study's own go to every run of `train.run`, such as
`--epochs 2`. The same command again goes on where a study stopped, and the same command started
beside it, also on another machine that shares DIR, takes over some of its runs. DIR then holds
`report.html`, `report.md`, `results.csv`, `statistics.json` and a folder a run.
"""

import argparse
import dataclasses
import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from models import parse_model
from train import run
from train.arguments import Parser, no_flag
from train.command import run_command
from train.config import RECIPES, OptimConfig
from train.errors import CheckpointError, LapisError, UsageError
from train.files import unwritable
from train.flags import names
from train.record import read_json, write_json
from train.study.page import write_study
from train.study.texts import LANGUAGES
from train.study.workers import Job, Workers

# what a recipe is made of, and the pairing of the runs does not rest on
INGREDIENTS = (
    *("image-size", "start-scale", "val-scale", "flips", "augment", "mixup", "cutmix", "sampler"),
    *(one.name.replace("_", "-") for one in dataclasses.fields(OptimConfig)),
    *("no-nesterov", "no-flips"),
)
OWN_FLAGS = ("--model", "--seed", "--fold", "--out", "--resume", "--threads")
OWN_FLAGS += ("--config", "--print-config", "--auto-batch")  # a batch would differ by machine


class FailedRuns(LapisError):
    """Runs of the study did not end well; the exit code is that of the first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is left of the study and write its report; returns the exit code."""
    arguments, flags = _parser().parse_known_args(argv)
    return run_command(
        lambda: study(arguments, [flag for flag in flags if flag != "--"]),
        debug=arguments.debug,
        interrupted="interrupted; the same command goes on after the last epochs",
    )


def _parser() -> Parser:
    parser = Parser("train.study", __doc__)
    parser.add_argument("--data", required=True, help="photos, as train.run takes them")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/study"),
        help="the study's folder (default: %(default)s)",
    )
    parser.add_argument(
        "--models",
        default="plain34,resnet34,resnet34+se,resnet34+preact",
        help="NAME+FLAG+FLAG=VALUE, separated by commas: resnet34+se+norm=group, or with a flag of "
        "the training, resnet34+mixup=0 (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="runs of each model: seeds 0, 1, .. (default: %(default)s)",
    )
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default="default",
        help="set of defaults of every run, as of train.run (default: %(default)s)",
    )
    parser.add_argument("--folds", type=int, help="cross-validate: each seed trains every fold")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time on this machine (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of a run (default: cores / jobs)")
    parser.add_argument(
        "--language", choices=LANGUAGES, default="en", help="of the report (default: %(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def study(arguments: argparse.Namespace, flags: Sequence[str]) -> None:
    """Raises UsageError for flags that cannot work, FailedRuns where a run did."""
    for name in ("seeds", "folds", "jobs", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
    known = [*names(), *_parser().flags]
    for flag in flags:
        if flag.startswith("--") and flag.split("=")[0].lstrip("-").replace("_", "-") not in known:
            raise UsageError(no_flag(flag, known))
        if flag.split("=")[0] in OWN_FLAGS:
            raise UsageError(f"{flag} is what a study varies or decides: leave it out")
    models = list(dict.fromkeys(arguments.models.split(",")))
    jobs, epochs = grid(arguments, models, flags)
    settings = {
        "data": arguments.data,
        "recipe": arguments.recipe,
        "folds": arguments.folds,
        "flags": list(flags),
    }
    remember(arguments.out, settings)
    threads = arguments.threads or max(1, torch.get_num_threads() // arguments.jobs)
    Workers(jobs, arguments.out / "claims", threads).work(arguments.jobs, epochs)
    command = ["python", "-m", "train.study", "--data", arguments.data, "--out", arguments.out]
    command += ["--models", ",".join(models), "--seeds", arguments.seeds]
    command += ["--recipe", arguments.recipe]
    command += ["--folds", arguments.folds] if arguments.folds else []
    command += ["--language", arguments.language] if arguments.language != "en" else []
    write_study(
        arguments.out,
        models=models,
        runs={job.name: job.folder for job in jobs},
        settings=settings,
        language=arguments.language,
        command=shlex.join(map(str, [*command, *flags])),
    )
    print(f"report: {arguments.out / 'report.html'}")
    failed = [job for job in jobs if not job.finished]
    if failed:
        reason, code = failed[0].failed_because()
        error = FailedRuns(
            f"{len(failed)} of {len(jobs)} runs failed, first {failed[0].name} ({reason}): "
            f"see {failed[0].folder / 'log.txt'}; the same command tries them again"
        )
        error.exit_code = code
        raise error


def grid(
    arguments: argparse.Namespace, models: Sequence[str], flags: Sequence[str]
) -> tuple[list[Job], int]:
    """All runs, seed by seed so that a study that stops early can compare, and the epochs of each.

    Raises UsageError for a model or flags that train.run does not take.
    """
    jobs, epochs = [], 0
    folds = range(1, arguments.folds + 1) if arguments.folds else (None,)
    common = ("--recipe", arguments.recipe, "--data", arguments.data, *flags)
    for seed, fold, model in itertools.product(range(arguments.seeds), folds, models):
        name = f"{model}-seed{seed}" + (f"-fold{fold}" if fold else "")
        folder = arguments.out / "runs" / name
        words = (*common, *model_flags(model), "--seed", str(seed))
        words += ("--fold", str(fold), "--folds", str(arguments.folds)) if fold else ()
        words += ("--out", str(folder))
        if seed == 0 and fold in (None, 1):  # the others differ in their numbers alone
            epochs = _checked(model, words)
        jobs.append(Job(name, folder, words))
    return jobs, epochs


def model_flags(model: str) -> tuple[str, ...]:
    """`resnet34+se+mixup=0` as flags of train.run: --model resnet34 --se --mixup 0; a part is a
    modification of the network or one of INGREDIENTS. Raises UsageError."""
    parts = model.split("+")
    given = [part for part in parts if part.partition("=")[0] in INGREDIENTS]
    try:
        name, options = parse_model("+".join(part for part in parts if part not in given))
    except ValueError as error:
        raise UsageError(f"--models: {error}") from error
    words = ["--model", name]
    for key, value in options.items():
        words += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    for part in given:
        flag, _, value = part.partition("=")
        words += [f"--{flag}", value] if value else [f"--{flag}"]
    return tuple(words)


def _checked(model: str, flags: Sequence[str]) -> int:
    try:
        return run.parse(list(flags)).optim.epochs
    except SystemExit as stop:  # its parser has said why
        raise UsageError(f"train.run does not take these flags for the model {model!r}") from stop


def remember(out: Path, settings: dict[str, object]) -> None:
    """study.json; models and seeds may be added to a study, nothing else may change."""
    try:
        for folder in ("runs", "claims"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error
    path = out / "study.json"
    if path.is_file():
        before = read_json(path)
        if not isinstance(before, dict) or before.keys() != settings.keys():
            raise CheckpointError(f"{path} is of another version: choose another --out")
        for name, value in before.items():
            if value != settings[name]:
                raise UsageError(
                    f"{out} holds a study with {name} {value!r}, not {settings[name]!r}: choose "
                    "another --out, or give the same"
                )
    else:
        write_json(path, settings)

"""What the folders of several runs say beside each other."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from models import model_label
from train.config import Config
from train.doctor.diagnose import FILE as DOCTOR
from train.doctor.remedy import OWN
from train.errors import CheckpointError, UsageError
from train.metrics import Interval, Scores, score, wilson
from train.page import NoteKind, percent
from train.quality import area_text, share_text
from train.record import read_json, read_jsonl
from train.run_report import flat
from train.study.comparing import compare_photos
from train.study.statistics import LEVEL, holm
from train.study.wording import p_value, points
from train.validation import FILE as VALIDATION
from train.validation import Validation, read_validation


@dataclass(frozen=True)
class Run:
    """What stands in a run's folder.

    summary: empty until the run is finished. doctor: what it found, None where it did not watch.
    split: split.csv, None without one.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    doctor: Sequence[Mapping[str, Any]] | None
    split: bytes | None
    validation: Validation | None

    @cached_property
    def scores(self) -> Scores | None:
        """Of the best weights so far."""
        found = self.validation
        return found and score(found.probability, found.labels, found.pictures)

    @property
    def model(self) -> str:
        return model_label(self.config["model"]["model"], self.config["model"])

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The first epoch of the best validation accuracy."""
        validated = [row for row in self.history if row["val_accuracy"] is not None]
        return max(validated, key=lambda row: row["val_accuracy"], default=None)

    def interval(self, accuracy: float) -> Interval | None:
        """The 95 % interval of a validation accuracy, counting pictures where they are known, else
        photos."""
        if self.validation is not None:
            trials = len(set(self.validation.pictures))
        else:
            rows = csv.DictReader(io.StringIO((self.split or b"").decode("utf-8", "replace")))
            trials = sum(row.get("split") == "val" for row in rows)
        return wilson(accuracy * trials, trials) if trials else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`, each under a name of its own. Raises UsageError where one is no run,
    is given twice or is alone, CheckpointError for damaged files."""
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} is no run: it has no config.json; name folders of runs")
    places = [folder.resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UsageError(f"{folders[number]} is given twice: name another run")
    if len(folders) < 2:
        raise UsageError("one run alone cannot be compared: name a second")
    names = [place.name for place in places]
    return [
        _read(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _read(folder: Path, name: str) -> Run:
    def stored(file: str) -> Any:
        return read_json(folder / file) if (folder / file).is_file() else None

    config, split = stored("config.json"), folder / "split.csv"
    groups = [group.name for group in dataclasses.fields(Config)]
    if not isinstance(config, dict) or not set(groups) <= set(config):
        raise CheckpointError(f"{folder / 'config.json'} is not of this version: leave {name} out")
    return Run(
        name,
        folder,
        {group: config[group] for group in groups},
        stored("summary.json") or {},
        read_jsonl(folder / "metrics.jsonl"),
        stored(DOCTOR),
        split.read_bytes() if split.is_file() else None,
        read_validation(folder),
    )


def figures(run: Run) -> dict[str, str | None]:
    """Name and text of every figure of a run; None is not known."""
    best, scores, summary = run.best, run.scores, run.summary
    last = run.history[-1] if run.history else {}
    done, epochs = len(run.history), run.config["optim"]["epochs"]
    seconds = sum(row["seconds"] for row in run.history)
    images = sum(row["seconds"] * row["images_per_second"] for row in run.history)
    parameters = summary.get("parameters")

    def accuracy(value: float | None) -> str | None:
        return None if value is None else share_text(value, run.interval(value))

    return {
        "model": run.model,
        "state": "finished" if summary else f"unfinished, {done} of {epochs} epochs",
        "best accuracy": best and accuracy(best["val_accuracy"]),
        "in epoch": best and str(best["epoch"]),
        "last accuracy": accuracy(last.get("val_accuracy")),
        "last accuracy in training": share_text(last.get("train_accuracy")),
        "last loss": _fixed(last.get("val_loss"), 4),
        "last loss in training": _fixed(last.get("train_loss"), 4),
        "macro F1": scores and area_text(scores.macro_f1),
        "calibration error": scores and percent(scores.calibration_error),
        "parameters": None if parameters is None else f"{parameters:,}",
        "images/s": _fixed(images / seconds, 1) if seconds else None,
        "seconds of training": _fixed(seconds, 1) if seconds else None,
        "seconds in all": _fixed(summary.get("seconds"), 1),
        "device": summary.get("device"),
        "backend": summary.get("backend"),
        "precision": summary.get("precision"),
    }


def _fixed(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:,.{digits}f}"


def settings(runs: Sequence[Run]) -> list[tuple[str, list[object]]]:
    """The settings in which `runs` differ, each with its value in every run; None where a run of
    another version does not have it."""
    every = [dict(flat(run.config)) for run in runs]
    names = dict.fromkeys(name for one in every for name in one if name not in OWN)
    rows = [(name, [one.get(name) for one in every]) for name in names]
    return [(name, values) for name, values in rows if any(v != values[0] for v in values)]


def recalls(runs: Sequence[Run]) -> list[tuple[str, list[str | None]]]:
    """Recall of every class in every run, with its interval."""
    known = [_class_recalls(run) for run in runs]
    names = dict.fromkeys(name for one in known for name in one)
    return [(name, [one.get(name) for one in known]) for name in names]


def _class_recalls(run: Run) -> dict[str, str | None]:
    if run.scores is None:
        return {}
    named = zip(run.validation.classes, run.scores.per_class, strict=True)
    return {name: share_text(one.recall, one.recall_interval) for name, one in named}


def findings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The rules of the doctor that found something in a run, with what that is in every run."""
    by_rule = [_found(run) for run in runs]
    names = dict.fromkeys(name for one in by_rule for name in one or ())
    return [
        (name, ["not watched" if one is None else one.get(name, "") for one in by_rule])
        for name in names
    ]


def _found(run: Run) -> dict[str, str] | None:
    if run.doctor is None:
        return None
    return {
        one["rule"]: "primary problem" if one["primary"] else one["severity"] for one in run.doctor
    }


@dataclass(frozen=True)
class Pair:
    """Two runs on the same validation photos: `photos` as `compare_photos` has it and Holm's `p` of
    McNemar's test over all pairs; or why they cannot be paired."""

    first: str
    second: str
    photos: Mapping[str, Any] | None = None
    p: float | None = None
    reason: str | None = None

    def sentence(self) -> tuple[NoteKind, str]:
        """What may be concluded."""
        if self.photos is None:
            return "warn", f"{self.second} and {self.first} cannot be paired: {self.reason}."
        mean, test = self.photos["mean"], self.photos["mcnemar"][0]
        low, high = points(self.photos["low"]), points(self.photos["high"])
        shown = self.p < 1 - LEVEL
        verdict = "no difference is shown"
        if shown:
            ahead = self.second if test["only_second"] > test["only_first"] else self.first
            verdict = f"these weights of {ahead} are better on such photos"
        return "good" if shown else "info", (
            f"{self.second} against {self.first}: {points(mean)} points of accuracy on the same"
            f" photos (95 % interval {low} to {high}); of {test['pictures']} pictures"
            f" {test['only_second']} are known to {self.second} alone and {test['only_first']} to"
            f" {self.first} alone (McNemar's test, Holm's p {p_value(self.p)}): {verdict}."
        )


def pairs(runs: Sequence[Run]) -> list[Pair]:
    """Every other run against the first."""
    first, found = runs[0], []
    for second in runs[1:]:
        reason = _why_not(first, second)
        photos = None
        if reason is None:
            photos = compare_photos([(first.validation, second.validation)])
        found.append((second.name, photos, reason))
    adjusted = holm([photos and photos["mcnemar"][0]["p"] for _, photos, _ in found])
    return [
        Pair(first.name, name, photos, p, reason)
        for (name, photos, reason), p in zip(found, adjusted, strict=True)
    ]


def _why_not(first: Run, second: Run) -> str | None:
    """Why two runs cannot be compared photo by photo; None where they can."""
    for run in (first, second):
        if run.split is None:
            return f"{run.name} has no split.csv"
    if first.split != second.split:
        return (
            "their splits differ, so that their accuracies are of different photos"
            f" (`--split {first.folder / 'split.csv'}` gives a run the very same)"
        )
    for run in (first, second):
        if run.validation is None:
            return f"{run.name} has no {VALIDATION}"
    if first.validation.files != second.validation.files:
        return f"their {VALIDATION} do not list the same photos"
    # another image size may group a few photos otherwise, but other photos share no picture
    if (first.validation.pictures == second.validation.pictures).mean() < 0.5:
        return "their photos have the same names but are others, as synthetic ones of two seeds are"
    return None

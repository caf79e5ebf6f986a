"""The runs of a study, read from the files of their folders: summary.json, metrics.jsonl,
measures.json and validation.csv, or failure.json."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from train.record import read_json, read_jsonl

OUTCOMES = (
    "best_val_accuracy",
    "final_val_accuracy",
    "final_train_accuracy",
    "final_val_loss",
    "final_train_loss",
)
COSTS = ("flops", "images_per_second", "training_seconds", "peak_memory_bytes")
COLUMNS = (
    "run",
    "model",
    "seed",
    "fold",
    "state",
    "epochs",
    "best_epoch",
    *OUTCOMES,
    "parameters",
    *COSTS,
    "train_photos",
    "val_photos",
    "val_pictures",
    "leaked_share",
    "device",
    "backend",
    "precision",
    "commit",
)


@dataclass(frozen=True)
class Validation:
    """validation.csv: files [N], labels int64 [N], pictures str [N], probability [N, K]."""

    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray
    pictures: np.ndarray
    probability: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool [N]."""
        return self.probability.argmax(axis=1) == self.labels


@dataclass(frozen=True)
class Run:
    """A run of the study; without a summary it failed, and `reason` says why."""

    name: str
    folder: Path
    summary: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    reason: str | None = None

    @property
    def model(self) -> str:
        return self.name.rpartition("-seed")[0]

    @property
    def pair(self) -> str:
        """Seed and fold: runs of one pair share split and order."""
        return self.name.rpartition("-seed")[2]

    @cached_property
    def validation(self) -> Validation | None:
        path = self.folder / "validation.csv"
        return read_validation(path) if self.summary and path.is_file() else None

    def value(self, name: str) -> float | None:
        """An outcome or a cost."""
        if name == "training_seconds":
            return sum(row["seconds"] for row in self.history)
        return self.measures.get(name, self.summary.get(name))


def read_run(name: str, folder: Path) -> Run:
    """The run in `folder`, finished or failed. Raises CheckpointError for damaged files."""
    if not (folder / "summary.json").is_file():
        failure = folder / "failure.json"
        return Run(name, folder, reason=read_json(failure)["reason"] if failure.is_file() else "-")
    measures = folder / "measures.json"
    epochs = {row["epoch"]: row for row in read_jsonl(folder / "metrics.jsonl")}
    return Run(
        name,
        folder,
        read_json(folder / "summary.json"),
        read_json(measures) if measures.is_file() else {},
        tuple(epochs[epoch] for epoch in sorted(epochs)),  # one is told twice after a crash
    )


def read_validation(path: Path) -> Validation:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as stream:
        header, *rows = csv.reader(stream)
    classes = tuple(name.removeprefix("p:") for name in header[3:])
    return Validation(
        classes,
        tuple(row[0] for row in rows),
        np.array([classes.index(row[1]) for row in rows]),
        np.array([row[2] for row in rows]),
        np.array([[float(cell) for cell in row[3:]] for row in rows]),
    )


def results_csv(runs: Sequence[Run]) -> bytes:
    """results.csv: a row a run."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(_row(run) for run in runs)
    return text.getvalue().encode()


def _row(run: Run) -> dict[str, Any]:
    seed, _, fold = run.pair.partition("-fold")
    row = {"run": run.name, "model": run.model, "seed": seed, "fold": fold}
    if not run.summary:
        return row | {"state": f"failed: {run.reason}"}
    split, checked = run.summary["split"], run.validation
    return row | {
        "state": "finished",
        **{name: run.value(name) for name in (*OUTCOMES, *COSTS)},
        **{k: run.summary.get(k) for k in ("epochs", "best_epoch", "parameters", "device")},
        **{k: run.summary.get(k) for k in ("backend", "precision")},
        "train_photos": split["train"],
        "val_photos": split["validation"],
        "val_pictures": None if checked is None else len(np.unique(checked.pictures)),
        "leaked_share": split["leaked_share"],
        "commit": run.summary["versions"].get("commit"),
    }

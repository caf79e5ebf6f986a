"""The runs of a study, read from the files of their folders: summary.json, metrics.jsonl,
measures.json and validation.csv, or failure.json."""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import CheckpointError
from train.record import read_json, read_jsonl
from train.validation import Validation, read_validation

OUTCOMES = (
    "best_val_accuracy",
    "final_val_accuracy",
    "final_train_accuracy",
    "final_val_loss",
    "final_train_loss",
)
COSTS = ("flops", "images_per_second", "training_seconds", "peak_memory_bytes")
CHECKED = ("split.csv", "validation.csv", "pictures.json")  # whose SHA-256 is in measures.json
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
        return read_validation(self.folder) if self.summary else None

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
    measures, summary = folder / "measures.json", read_json(folder / "summary.json")
    measured, history = read_json(measures) if measures.is_file() else {}, ()
    try:
        epochs = {row["epoch"]: row for row in read_jsonl(folder / "metrics.jsonl")}
        history = tuple(epochs[epoch] for epoch in sorted(epochs))  # told twice after a crash
        run = Run(name, folder, summary, measured, history)
        numbers = [run.value(one) for one in (*OUTCOMES, *COSTS)]
        numbers += [summary["parameters"], *map(summary["split"].get, ("train", "validation"))]
        whole = all(one is None or isinstance(one, int | float) for one in numbers)
        whole &= len(history) == summary["epochs"]
        _checked_files(folder, measured)
        _row(run)
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"summary.json, metrics.jsonl or measures.json in {folder} lacks what a study reads: "
            "remove the folder, and the study trains that run again"
        )
    return run


def _checked_files(folder: Path, measures: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a file that is another than the one `measures` was written with."""
    for name in CHECKED:
        path, digest = folder / name, measures.get("files", {}).get(name)
        if digest is None:
            continue
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise CheckpointError(
                f"{path} is missing or damaged: remove measures.json beside it, and the study "
                "measures the run again"
            )


def results_csv(runs: Sequence[Run]) -> bytes:
    """results.csv: a row a run."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(_row(run) for run in runs)
    return text.getvalue().encode("utf-8", "replace")


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

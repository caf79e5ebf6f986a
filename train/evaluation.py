"""What a trained network says of labelled photos, and what that is worth."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from train import checkpoint, metrics
from train.config import from_dict
from train.data import open_photos
from train.data.photos import Photos
from train.data.split_file import COLUMNS
from train.data.table import read_rows
from train.data.twins import twins_of
from train.errors import DataError, UsageError
from train.inputs import digest_of
from train.predictor import Prediction, Trained, predict, progress, weights_file


@dataclass(frozen=True)
class Evaluation:
    """What a network says of labelled photos.

    labels: int64 [N], positions in the network's classes. twins: bool [N], photos whose picture the
    network was trained on; None where that is not recorded. skipped: files and reasons.
    """

    trained: Trained
    data: str
    predictions: tuple[Prediction, ...]
    labels: np.ndarray
    twins: np.ndarray | None
    skipped: tuple[tuple[str, str], ...]

    @property
    def probability(self) -> np.ndarray:
        """float64 [N, K]."""
        return np.stack([one.probability for one in self.predictions])

    @property
    def right(self) -> np.ndarray:
        """bool [N]."""
        return self.probability.argmax(axis=1) == self.labels

    @property
    def pictures(self) -> np.ndarray:
        """int64 [N], equal for photos of which the network sees the same pixels."""
        digests = [hashlib.sha256(one.square).hexdigest() for one in self.predictions]
        return np.unique(digests, return_inverse=True)[1]

    def scores(self) -> metrics.Scores:
        return metrics.score(self.probability, self.labels, self.pictures)

    def as_json(self) -> dict[str, Any]:
        """All figures; shares are 0..1."""
        values = metrics.as_json(self.scores(), self.trained.classes)
        return values | {"twins": self.twin_figures(), "skipped": dict(self.skipped)}

    def twin_figures(self) -> dict[str, Any] | None:
        if self.twins is None:
            return None
        fresh = self.right[~self.twins]
        return {
            "images": int(self.twins.sum()),
            "share": float(self.twins.mean()),
            "accuracy_without": float(fresh.mean()) if len(fresh) else None,
        }


def evaluate(
    trained: Trained, photos: Photos, *, batch_size: int = 32, flips: bool | None = None
) -> Evaluation:
    """What `trained` says of `photos`; flips: see `predict`. Raises DataError for a class it does
    not know, or where no photo can be read."""
    unknown = sorted(set(photos.classes) - set(trained.classes))
    if unknown:
        raise DataError(
            f"{photos.name} has the class {unknown[0]}, which the network does not know (it knows "
            f"{', '.join(trained.classes)}): rename or leave it out"
        )
    place = np.array([trained.classes.index(label) for label in photos.classes])
    predictions, chosen = [], []
    skipped = [(one.file, one.reason) for one in photos.excluded if one.bad]
    with progress(len(photos)) as bar:
        run = predict(trained, photos.files, photos.load, batch_size=batch_size, flips=flips)
        for number, one in enumerate(run):
            bar.update()
            if one.reason is not None:
                skipped.append((one.name, one.reason))
                continue
            predictions.append(one)
            chosen.append(number)
    if not chosen:
        raise DataError(f"no photo of {photos.name} can be read: check the path")
    twins = None
    if trained.manifest is not None:
        twins = twins_of(photos.subset(chosen), trained.manifest)
    labels = place[photos.labels[chosen]]
    return Evaluation(trained, photos.name, tuple(predictions), labels, twins, tuple(skipped))


def validation_photos(run: Path) -> Photos:
    """The photos on which the run in the folder `run` was validated, labelled as it saw them.

    Raises UsageError where `run` is no folder of a run, or had no validation; DataError where its
    data is no longer the same.
    """
    table = run / "split.csv"
    if not table.is_file():
        raise UsageError(
            f"{run} has no split.csv, which says what was validated on: name the run's folder, or "
            "give --data PATH"
        )
    path = weights_file(run)
    state = checkpoint.load(path)
    config = from_dict(state.get("config"), path)
    wanted = config.data.classes if config.data.relabel is None else ()
    photos = open_photos(config.data.data, classes=wanted, seed=config.run.seed)
    rows = [tuple(cells[name] for name in COLUMNS) for _, cells in read_rows(table, COLUMNS)]
    place = {file: number for number, file in enumerate(photos.files)}
    changed = f"{config.data.data} is not what {run} was trained on any more"
    for file, _, _ in rows:
        if file not in place:
            raise DataError(f"{changed} ({file} is missing): restore it, or give --data PATH")
    photos = photos.subset([place[file] for file, _, _ in rows])
    if digest_of(photos.digests, rows) != state.get("data_digest"):
        raise DataError(f"{changed} (a photo or its side differs): restore it, or give --data PATH")
    classes = tuple(state["classes"])
    labels = np.array([classes.index(label) for _, label, _ in rows])
    validated = np.flatnonzero([side == "val" for _, _, side in rows])
    if not len(validated):
        raise UsageError(f"{run} had no validation photos: give --data PATH")
    photos = replace(photos, name=f"{photos.name}-validation", classes=classes, labels=labels)
    return replace(photos.subset(validated), excluded=())

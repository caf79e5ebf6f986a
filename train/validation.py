"""`validation.csv` of a run folder: what its best weights say of every validation photo."""

import csv
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from train.config import DataConfig
from train.errors import CheckpointError, DiskError
from train.files import write_atomically
from train.inputs import Inputs, evaluated, pictures_of
from train.loop import Listener
from train.metrics import probabilities
from train.training import Training

FILE = "validation.csv"


@dataclass(frozen=True)
class Validation:
    """validation.csv: files [N], labels int64 [N], pictures str [N], equal for photos of one
    picture, and probability [N, K], as the network gives it."""

    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray
    pictures: np.ndarray
    probability: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool [N]."""
        return self.probability.argmax(axis=1) == self.labels


class ValidationKeeper(Listener):
    """Writes validation.csv after each epoch that is the best so far, ahead of its checkpoint. Only
    the run's last report needs it, so that a full disk is a warning."""

    def __init__(self, folder: Path, inputs: Inputs):
        self.folder = folder
        self.inputs = inputs
        self.logits: Tensor | None = None

    def evaluated(self, logits: Tensor, labels: Tensor) -> None:
        self.logits = logits

    def epoch_ended(self, training: Training, record: dict[str, Any]) -> None:
        if training.best is not None and training.best["epoch"] == record["epoch"]:
            try:
                write_validation(self.folder, self.inputs, probabilities(self.logits.numpy()))
            except DiskError as error:
                warnings.warn(f"{error}: {FILE} was not written", stacklevel=1)


def write_validation(folder: Path, inputs: Inputs, probability: np.ndarray) -> None:
    """Write validation.csv: a row a validation photo. Raises DiskError."""
    photos, rows = inputs.photos, inputs.split.val
    pictures = _picture_names(inputs)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["filename", "label", "picture", *(f"p:{label}" for label in photos.classes)])
    for row, shares in zip(rows, probability.tolist(), strict=True):
        label = photos.classes[photos.labels[row]]
        cells = (f"{share:.9g}" for share in shares)
        writer.writerow([photos.files[row], label, pictures[row], *cells])
    write_atomically(folder / FILE, text.getvalue().encode("utf-8", "surrogateescape"))


def _picture_names(inputs: Inputs) -> np.ndarray:
    """str [N], equal for photos of one picture, in every run on these photos: the smallest of their
    digests, shortened."""
    digests = np.array([digest[:12] for digest in inputs.photos.digests])
    _, place = np.unique(pictures_of(inputs.images, inputs.photos), return_inverse=True)
    order = np.lexsort((digests, place))
    first = np.searchsorted(place[order], np.arange(place.max() + 1))
    return digests[order][first][place]


def read_validation(folder: Path) -> Validation | None:
    """What validation.csv of a run folder holds, None without one. Raises CheckpointError when it
    is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as stream:
            header, *rows = csv.reader(stream)
        classes = tuple(name.removeprefix("p:") for name in header[3:])
        return Validation(
            classes,
            tuple(row[0] for row in rows),
            np.array([classes.index(row[1]) for row in rows]),
            np.array([row[2] for row in rows]),
            np.array([[float(cell) for cell in row[3:]] for row in rows]).reshape(-1, len(classes)),
        )
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove it") from error


def validation_square(inputs: Inputs, data: DataConfig, number: int) -> np.ndarray:
    """Validation photo `number`, from 0, as the network saw it: uint8 [S, S, 3]."""
    stored = inputs.images[inputs.split.val[number]]
    return evaluated(stored, data)

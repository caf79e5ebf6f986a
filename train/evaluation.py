"""What a trained network says of labelled photos, and what that is worth."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from train import metrics
from train.data.photos import Photos
from train.data.twins import twins_of
from train.errors import DataError
from train.predictor import Prediction, Trained, predict, progress


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

    def scores(self) -> metrics.Scores:
        return metrics.score(self.probability, self.labels)

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
    trained: Trained, photos: Photos, *, batch_size: int = 32, flips: bool = False
) -> Evaluation:
    """What `trained` says of `photos`. Raises DataError for a class it does not know, or where no
    photo can be read."""
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

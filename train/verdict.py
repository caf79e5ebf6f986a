"""The sentence at the head of a run's report."""

from collections.abc import Mapping, Sequence

import numpy as np

from train.metrics import Interval, wilson
from train.page import NoteKind, percent

History = Sequence[Mapping[str, float | None]]  # metrics.jsonl

WIDENED = 5.0  # percentage points; a smaller growth of the train-validation gap is noise


def verdict(
    summary: Mapping[str, object],
    history: History,
    confusion: Sequence[Sequence[int]] | np.ndarray | None = None,
    classes: Sequence[str] = (),
    interval: Interval | None = None,
) -> tuple[NoteKind, str]:
    """One sentence on the result, and how good it is: above chance, and without overfitting.

    interval: of the best accuracy, where more is known than counts of photos.
    """
    best = summary.get("best_val_accuracy")
    if best is None:
        accuracy = summary.get("final_train_accuracy")
        ending = "" if accuracy is None else f" (training accuracy {percent(accuracy)} at the end)"
        return "info", f"There was no validation, so nothing is known about unseen photos{ending}."
    images, chance = _baseline(summary, confusion, classes)
    sentence = f"Best validation accuracy {percent(best)} in epoch {summary.get('best_epoch')}"
    sentence += f" of {summary.get('epochs')}"
    kind: NoteKind = "good"
    context = []
    if images:
        low, high = interval or wilson(round(best * images), images)
        context.append(
            f"{round(best * images)} of {images} photos, 95 % interval"
            f" {percent(low)} to {percent(high)}"
        )
        if chance is not None and low <= chance:
            kind = "bad"
    if chance is not None:
        context.append(f"chance {percent(chance)}")
    if context:
        sentence += f" ({'; '.join(context)})"
    if kind == "bad":
        sentence += ", which is not clearly better than guessing"
    gaps = _gaps(history)
    if len(gaps) > 1:
        third = max(1, len(gaps) // 3)
        early, late = float(np.mean(gaps[:third])), float(np.mean(gaps[-third:]))
        if late - early >= WIDENED:
            kind = "bad" if kind == "bad" else "warn"
            sentence += (
                "; the gap between training and validation accuracy widened from"
                f" {early:.1f} to {late:.1f} points, a sign of overfitting"
            )
        else:
            sentence += (
                "; the gap between training and validation accuracy did not widen"
                f" ({early:.1f} points early, {late:.1f} late)"
            )
    return kind, sentence + "."


def _baseline(
    summary: Mapping[str, object],
    confusion: Sequence[Sequence[int]] | np.ndarray | None,
    classes: Sequence[str],
) -> tuple[int, float | None]:
    """The number of validation images, and what always naming the most frequent class scores."""
    if confusion is not None and np.sum(confusion) > 0:
        rows = np.asarray(confusion).sum(axis=1)
        return int(rows.sum()), float(rows.max() / rows.sum())
    images = (summary.get("split") or {}).get("validation") or 0
    return int(images), 1 / len(classes) if classes else None


def _gaps(history: History) -> list[float]:
    """Training minus validation accuracy in points, for the epochs that have both."""
    pairs = ((row.get("train_accuracy"), row.get("val_accuracy")) for row in history)
    return [100 * (train - val) for train, val in pairs if train is not None and val is not None]

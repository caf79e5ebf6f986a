"""The sections of a page on how good predictions are: classes, calibration, and the worst mistakes
with the places of the photo that led to them."""

import io
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from train.cam import activation_maps, overlay
from train.metrics import ClassScore, Interval, Scores
from train.page import Page, percent
from train.plots import plot_calibration, plot_confusion
from train.predictor import Trained

WORST = 12  # mistakes shown


def add_classes(
    page: Page,
    confusion: np.ndarray,
    per_class: Sequence[ClassScore],
    classes: Sequence[str],
    folder: Path,
) -> None:
    """Add the section of the classes, and confusion_matrix.png to `folder`. confusion: counts
    [true class, predicted class]."""
    page.section("Classes")
    plot_confusion(confusion, classes, folder / "confusion_matrix.png")
    page.figure(
        folder / "confusion_matrix.png",
        "Photos by true and predicted class; the colour is the share of the row.",
        "Confusion matrix; the table below holds its precision and recall.",
        plot=True,
    )
    with_areas = any(one.auc is not None for one in per_class)
    header = ["class", "photos", "precision", "recall", "F1", "AUC", "most often taken for"]
    caption = (
        "Precision: how often the network is right when it names the class. Recall: how many of the"
        " class's photos it finds. F1: their harmonic mean."
    )
    if with_areas:
        caption += (
            " AUC: the chance that a photo of the class gets a higher probability of it than"
            " another photo does; 0.5 is guessing. In brackets the 95 % intervals, for which all"
            " copies of a picture count once."
        )
    else:
        header.remove("AUC")
    rows = []
    for index, (name, one) in enumerate(zip(classes, per_class, strict=True)):
        row = [name, one.images, share_text(one.precision, one.precision_interval)]
        row += [share_text(one.recall, one.recall_interval), area_text(one.f1, one.f1_interval)]
        row += [area_text(one.auc, one.auc_interval)] if with_areas else []
        rows.append((*row, _taken_for(confusion[index], index, classes)))
    page.table(header, rows, caption)


def share_text(value: float | None, interval: Interval | None = None) -> str | None:
    """A share 0..1 as a percentage, with its interval in brackets."""
    if value is None or interval is None:
        return None if value is None else percent(value)
    low, high = (f"{100 * bound:.0f}" for bound in interval)
    return f"{percent(value)} [{low},\u00a0{high}]"


def area_text(value: float | None, interval: Interval | None = None) -> str | None:
    """A score 0..1, with its interval in brackets."""
    if value is None or interval is None:
        return None if value is None else f"{value:.3f}"
    low, high = (f"{bound:.2f}" for bound in interval)
    return f"{value:.3f} [{low},\u00a0{high}]"


def _taken_for(row: np.ndarray, index: int, classes: Sequence[str]) -> str | None:
    wrong = row.copy()
    wrong[index] = 0
    return f"{classes[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else None


def add_calibration(page: Page, scores: Scores, folder: Path, more: str = "") -> None:
    """Add the section of the calibration, and calibration.png to `folder`. more: a sentence for
    its caption."""
    page.section("Calibration")
    plot_calibration(scores.calibration, folder / "calibration.png")
    page.figure(
        folder / "calibration.png",
        "How often predictions of a confidence are right. Mean distance from the diagonal (expected"
        f" calibration error): {percent(scores.calibration_error)}.{more}",
        "Calibration curve.",
        plot=True,
    )


def add_mistakes(
    page: Page,
    trained: Trained,
    probability: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    pictures: Sequence[Hashable],
    square: Callable[[int], np.ndarray],
) -> None:
    """Add the photos that `trained` is most sure of and wrong, each picture once; nothing where all
    are right.

    probability [N, K]; labels int64 [N]; names and pictures [N], the latter equal for photos of one
    picture; square: the photo of a row, uint8 [S, S, 3].
    """
    worst = list(islice(surest_mistakes(probability, labels, pictures), WORST))
    if not worst:
        return
    page.section("Worst mistakes")
    shown = "" if trained.model is None else "; beside each what speaks for the class named"
    page.text(f"Photos it is most sure of, and wrong{shown}. A wrong label looks like this too.")
    gallery = []
    for i in worst:
        named, label = int(probability[i].argmax()), trained.classes[labels[i]]
        sure = percent(probability[i, named])
        caption = f"{names[i]}: {label}, taken for {trained.classes[named]} ({sure})"
        gallery.append((with_evidence(trained, square(i), named), caption, f"A photo of {label}."))
    page.gallery(gallery)


def surest_mistakes(
    probability: np.ndarray, labels: np.ndarray, pictures: Sequence[Hashable]
) -> Iterator[int]:
    """Rows of the mistakes, the surest first, of each picture the first."""
    sure, seen = probability.max(axis=1), set()
    wrong = np.flatnonzero(probability.argmax(axis=1) != labels)
    for i in wrong[np.argsort(-sure[wrong], kind="stable")]:
        if pictures[i] not in seen:
            seen.add(pictures[i])
            yield int(i)


def with_evidence(trained: Trained, square: np.ndarray, named: int) -> bytes:
    """A photo uint8 [S, S, 3] as JPEG, where the network is at hand beside what speaks for the
    class `named`."""
    picture = square
    if trained.model is not None:
        _, maps = activation_maps(trained.model, trained.images([square]))
        picture = np.concatenate([square, overlay(square, maps[0, named].cpu().numpy())], axis=1)
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=85)
    return data.getvalue()

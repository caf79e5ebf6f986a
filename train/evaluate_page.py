"""`evaluation.html`: the figures of `train.evaluate` with pictures."""

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from train.cam import activation_maps, overlay
from train.evaluation import Evaluation
from train.page import Page
from train.plots import plot_calibration, plot_confusion
from train.predictor import Trained
from train.run_report import percent

WORST = 12  # mistakes shown


def write_page(found: Evaluation, folder: Path) -> None:
    """Write confusion_matrix.png, calibration.png and evaluation.html. Raises DiskError."""
    scores, classes = found.scores(), found.trained.classes
    page = Page(f"{found.data}: evaluation", f"Network `{found.trained.config.model.model}`")
    low, high = scores.accuracy_interval
    page.note(
        "info",
        f"Accuracy {percent(scores.accuracy)} on {scores.images} photos (95 % interval "
        f"{percent(low)} to {percent(high)}).",
    )
    twins = found.twin_figures()
    if twins is None:
        page.note("warn", "Which photos the network was trained on is not recorded in this file.")
    elif twins["images"]:
        fresh = twins["accuracy_without"]
        page.note(
            "bad",
            f"{twins['images']} photos ({percent(twins['share'])}) show a picture the network was "
            "trained on, so their accuracy is memory"
            + ("." if fresh is None else f"; without them it is {percent(fresh)}."),
        )
    page.section("Classes")
    page.table(
        ("Class", "Photos", "Precision", "Recall", "F1", "AUC", "AUC, 95 % interval"),
        [
            (
                label,
                one.images,
                one.precision and percent(one.precision),
                one.recall and percent(one.recall),
                one.f1,
                one.auc,
                one.auc_interval and "{:.3f} to {:.3f}".format(*one.auc_interval),
            )
            for label, one in zip(classes, scores.per_class, strict=True)
        ],
        "AUC: the chance that a photo of the class gets a higher probability of it than another "
        "photo does; 0.5 is guessing.",
    )
    plot_confusion(scores.confusion, classes, folder / "confusion_matrix.png")
    page.figure(
        folder / "confusion_matrix.png",
        "Photos by true and predicted class; the colour is the share of the row.",
        "Confusion matrix; the table above holds its precision and recall.",
        plot=True,
    )
    page.section("Calibration")
    plot_calibration(scores.calibration, folder / "calibration.png")
    page.figure(
        folder / "calibration.png",
        f"How often predictions of a confidence are right. Mean distance from the diagonal: "
        f"{percent(scores.calibration_error)}.",
        "Calibration curve.",
        plot=True,
    )
    _mistakes(page, found)
    if found.skipped:
        page.section("Skipped files")
        page.table(("File", "Reason"), found.skipped)
    page.write(folder / "evaluation.html")


def _mistakes(page: Page, found: Evaluation) -> None:
    worst = list(islice(_surest_mistakes(found), WORST))
    if not worst:
        return
    page.section("Worst mistakes")
    shown = "" if found.trained.model is None else "; beside each what speaks for the class named"
    page.text(f"Photos it is most sure of, and wrong{shown}. A wrong label looks like this too.")
    page.gallery(_picture(found, i) for i in worst)


def _surest_mistakes(found: Evaluation) -> Iterator[int]:
    """Positions of the mistakes, the surest first, of identical photos the first."""
    wrong, seen = np.flatnonzero(~found.right), set()
    for i in wrong[np.argsort(-found.probability[wrong].max(axis=1), kind="stable")]:
        pixels = found.predictions[i].square.tobytes()
        if pixels not in seen:
            seen.add(pixels)
            yield int(i)


def _picture(found: Evaluation, i: int) -> tuple[bytes, str, str]:
    one, classes = found.predictions[i], found.trained.classes
    named, label = int(one.probability.argmax()), classes[found.labels[i]]
    sure = percent(one.probability[named])
    return (
        with_evidence(found.trained, one.square, named),
        f"{one.name}: {label}, taken for {classes[named]} ({sure})",
        f"A photo of {label}.",
    )


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

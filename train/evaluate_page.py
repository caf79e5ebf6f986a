"""`evaluation.html`: the figures of `train.evaluate` with pictures."""

from pathlib import Path

from train.evaluation import Evaluation
from train.page import Page, percent
from train.quality import add_calibration, add_classes, add_mistakes


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
    add_classes(page, scores.confusion, scores.per_class, classes, folder)
    add_calibration(page, scores, folder)
    squares = [one.square for one in found.predictions]
    add_mistakes(
        page,
        found.trained,
        found.probability,
        found.labels,
        [one.name for one in found.predictions],
        found.pictures,
        squares.__getitem__,
    )
    if found.skipped:
        page.section("Skipped files")
        page.table(("File", "Reason"), found.skipped)
    page.write(folder / "evaluation.html")

"""`comparison.html`: runs side by side."""

from collections.abc import Sequence
from pathlib import Path

from train.comparison import Run, figures, findings, pairs, recalls, settings
from train.page import Page
from train.plots import plot_runs


def write_page(runs: Sequence[Run], folder: Path) -> None:
    """Write curves.png and comparison.html. Raises DiskError."""
    names = [run.name for run in runs]
    page = Page("Runs side by side", ", ".join(f"`{name}`" for name in names))
    for pair in pairs(runs):
        page.note(*pair.sentence())
    page.text(
        "Every run is one training: what another seed would change is in none of these intervals."
        " `python -m train.study` trains several."
    )
    page.section("Figures")
    every = [figures(run) for run in runs]
    page.table(
        ("", *names),
        [(name, *(one[name] for one in every)) for name in every[0]],
        "Accuracies are of the validation photos, with 95 % intervals for which all copies of a"
        " picture count once; loss, too, unless it says otherwise. Macro F1 and calibration error"
        " are of the best weights.",
    )
    page.section("Settings that differ")
    if different := settings(runs):
        page.table(("", *names), [(name, *values) for name, values in different])
    else:
        page.text("None.")
    if any(run.history for run in runs):
        page.section("Curves")
        plot_runs({run.name: run.history for run in runs}, folder / "curves.png")
        page.figure(
            folder / "curves.png",
            "Validation bold, training thin.",
            "Loss and accuracy of all runs by epoch.",
            plot=True,
        )
    if shares := recalls(runs):
        page.section("Recall of each class")
        page.table(
            ("class", *names),
            [(name, *values) for name, values in shares],
            "How many of the class's validation photos the best weights find, with 95 % intervals.",
        )
    page.section("Doctor")
    if found := findings(runs):
        page.table(("rule", *names), [(name, *values) for name, values in found])
    else:
        watched = any(run.doctor is not None for run in runs)
        page.text("It found nothing." if watched else "It watched none of them.")
    page.write(folder / "comparison.html")

"""`report.html` of a run: what the numbers say, in one sentence, then everything behind it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from train.doctor.section import add_section
from train.metrics import wilson
from train.page import NoteKind, Page
from train.plots import plot_confusion, plot_curves
from train.profile_section import add_profile

History = Sequence[Mapping[str, float | None]]

WIDENED = 5.0  # percentage points; a smaller growth of the train-validation gap is noise


def write_report(
    folder: Path,
    *,
    config: Mapping[str, object],
    summary: Mapping[str, object],
    history: History,
    confusion: Sequence[Sequence[int]] | np.ndarray | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Write `curves.png`, `confusion_matrix.png` (with `confusion`) and `report.html`, which also
    shows the `batch.png` of the folder.

    `summary` and `history` are what `summary.json` and `metrics.jsonl` hold; `confusion` counts
    validation images `[true class, predicted class]` of the best epoch, in the order of `classes`.
    A profile in `folder` (`profiling.train_profile`) is shown too.
    Raises `DiskError` when `folder` is not writable.
    """
    folder = Path(folder)
    page = Page(f"{summary['model']}: training report", f"Run `{folder.resolve().name}`")
    page.note(*verdict(summary, history, confusion, classes))
    _run_facts(page, summary)
    _doctor(page, folder)

    page.section("Curves")
    plot_curves(history, folder / "curves.png")
    page.figure(
        folder / "curves.png",
        "Loss, accuracy and the overfitting monitor: a gap that keeps opening means the model"
        " learns its training photos by heart. The ring marks the best validation accuracy.",
        "Training and validation loss and accuracy by epoch, and their differences.",
        plot=True,
    )
    if confusion is not None:
        page.section("Classes")
        plot_confusion(confusion, classes, folder / "confusion_matrix.png")
        page.figure(
            folder / "confusion_matrix.png",
            "Validation photos by true and predicted class; the colour is the share of the row.",
            "Confusion matrix; the table below holds its precision and recall.",
            plot=True,
        )
        _class_table(page, np.asarray(confusion), classes)
    if (folder / "batch.png").is_file():
        page.section("Training batch")
        page.figure(
            folder / "batch.png",
            "The first training batch as the network sees it, augmented and mixed; where two photos"
            " are mixed, their shares stand below.",
            "Photos of the first training batch with their classes.",
        )
    _split(page, summary.get("split") or {})
    _epochs(page, history)
    add_profile(page, folder)

    page.section("Configuration")
    page.facts({_label(name): value for name, value in _flat(config)})
    page.section("Reproduce")
    command = summary.get("command", "")
    page.command(command if isinstance(command, str) else shlex.join(command))
    page.facts(dict(summary.get("versions") or {}))
    page.write(folder / "report.html")


def verdict(
    summary: Mapping[str, object],
    history: History,
    confusion: Sequence[Sequence[int]] | np.ndarray | None = None,
    classes: Sequence[str] = (),
) -> tuple[NoteKind, str]:
    """One sentence on the result, and how good it is: above chance, and without overfitting."""
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
        low, high = wilson(round(best * images), images)
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


def percent(share: float) -> str:
    """A fraction 0..1 as a percentage with one decimal; the sign never starts a line."""
    return f"{100 * share:.1f}\u00a0%"


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


def _run_facts(page: Page, summary: Mapping[str, object]) -> None:
    backend, reason = summary.get("backend"), summary.get("backend_reason")
    speed, seconds = summary.get("images_per_second"), summary.get("seconds")
    page.facts(
        {
            "Model": summary.get("model"),
            "Parameters": summary.get("parameters"),
            "Trainable parameters": summary.get("trainable_parameters"),
            "Device": summary.get("device"),
            "Backend": f"{backend} ({reason})" if reason else backend,
            "Training speed": None if speed is None else f"{speed:.1f} images/s",
            "Duration": None if seconds is None else _duration(seconds),
            "Seed": str(summary.get("seed")),
        }
    )
    if summary.get("best_val_accuracy") is not None:
        page.text(
            "The best epoch was chosen on the same photos it is measured on, so its accuracy is"
            " slightly flattered; photos kept aside until the end would tell exactly."
        )


def _doctor(page: Page, folder: Path) -> None:
    """What the doctor found, where it watched; the report does without it if that fails."""
    try:
        add_section(page, folder)
    except Exception as error:
        page.note("warn", f"The doctor's findings cannot be shown: {error}.")


def _class_table(page: Page, counts: np.ndarray, classes: Sequence[str]) -> None:
    rows = []
    for index, name in enumerate(classes):
        hits, photos, named = counts[index, index], counts[index].sum(), counts[:, index].sum()
        wrong = counts[index].copy()
        wrong[index] = 0
        rows.append(
            (
                name,
                int(photos),
                percent(hits / named) if named else None,
                percent(hits / photos) if photos else None,
                f"{classes[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else None,
            )
        )
    page.table(
        ("class", "photos", "precision", "recall", "most often taken for"),
        rows,
        "Precision: how often the model is right when it names the class. Recall: how many of the"
        " class's photos it finds.",
    )


def _split(page: Page, split: Mapping[str, object]) -> None:
    if not split:
        return
    page.section("Split")
    leaked = split.get("leaked_share")
    if leaked:
        page.note(
            "warn",
            f"{percent(leaked)} of the validation images have an identical twin in the training"
            " set, so the validation accuracy is too high; `--split grouped` keeps twins together.",
        )
    page.facts(
        {
            _label(name): percent(value)
            if name.endswith(("share", "fraction")) and value is not None
            else value
            for name, value in _flat(split)
        }
    )


def _epochs(page: Page, history: History) -> None:
    page.section("Epochs")
    rows = [
        (
            row["epoch"],
            _fixed(row.get("train_loss")),
            _fixed(row.get("val_loss")),
            _percent(row.get("train_accuracy")),
            _percent(row.get("val_accuracy")),
            row.get("learning_rate"),
            _fixed(row.get("images_per_second"), 1),
            _fixed(row.get("seconds"), 1),
        )
        for row in history
    ]
    header = ("epoch", "train loss", "val loss", "train accuracy", "val accuracy")
    page.table((*header, "learning rate", "images/s", "seconds"), rows)


def _fixed(value: float | None, digits: int = 4) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else percent(value)


def _flat(mapping: Mapping[str, object]) -> list[tuple[str, object]]:
    """Names and values of nested mappings in order; flags are flat, so names do not collide."""
    pairs: list[tuple[str, object]] = []
    for name, value in mapping.items():
        pairs.extend(_flat(value) if isinstance(value, Mapping) else [(name, value)])
    return pairs


def _label(name: str) -> str:
    return name.replace("_", " ")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

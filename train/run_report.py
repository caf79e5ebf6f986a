"""`report.html` of a run: what the numbers say, in one sentence, then everything behind it."""

import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train import checkpoint
from train.doctor.section import add_section
from train.errors import CheckpointError
from train.metrics import Scores, calibration, count_scores, fit_temperature, probabilities, score
from train.page import Page, percent
from train.plots import plot_curves
from train.predictor import load_trained
from train.profile_section import add_profile
from train.quality import add_calibration, add_classes, add_mistakes
from train.record import read_json
from train.validation import FILE as VALIDATION
from train.validation import Validation, read_validation
from train.verdict import History, verdict


def write_report(
    folder: Path,
    *,
    config: Mapping[str, object],
    summary: Mapping[str, object],
    history: History,
    confusion: Sequence[Sequence[int]] | np.ndarray | None = None,
    classes: Sequence[str] = (),
    square: Callable[[int], np.ndarray] | None = None,
) -> None:
    """Write `report.html`, and its plots beside it; it also shows the `batch.png` of the folder.

    `summary` and `history` are what `summary.json` and `metrics.jsonl` hold; `confusion` counts
    validation images `[true class, predicted class]` of the best epoch, in the order of `classes`.
    With the folder's `validation.csv` of that epoch the page has intervals and the calibration, and
    with `square` (validation photo number i as uint8 [S, S, 3]) also the worst mistakes. A profile
    in `folder` (`profiling.train_profile`) is shown too. What cannot be drawn is named instead.
    Raises `DiskError` when `report.html` cannot be written.
    """
    folder = Path(folder)
    page = Page(f"{summary['model']}: training report", f"Run `{folder.resolve().name}`")
    known = _attempt(page, "What is known of each photo", _known, folder, confusion)
    checked, scores = known or (None, None)
    page.note(*verdict(summary, history, confusion, classes, scores and scores.accuracy_interval))
    _run_facts(page, summary, history)
    _attempt(page, "The doctor's findings", add_section, page, folder)

    page.section("Curves")
    _attempt(page, "The curves", _curves, page, history, folder)
    if confusion is not None:
        counts = np.asarray(confusion)
        per_class = count_scores(counts) if scores is None else scores.per_class
        _attempt(page, "The classes", add_classes, page, counts, per_class, classes, folder)
    if scores is not None:
        _attempt(page, "The calibration", _calibration, page, folder, checked, scores)
    if checked is not None and square is not None:
        _attempt(page, "The worst mistakes", _mistakes, page, folder, checked, square)
    if (folder / "batch.png").is_file():
        _attempt(page, "The training batch", _batch, page, folder)
    _split(page, summary.get("split") or {})
    _epochs(page, history)
    add_profile(page, folder)

    page.section("Configuration")
    page.facts({_label(name): value for name, value in flat(config)})
    page.section("Reproduce")
    command = summary.get("command", "")
    page.command(command if isinstance(command, str) else shlex.join(command))
    page.facts(dict(summary.get("versions") or {}))
    page.write(folder / "report.html")


def rewrite_report(folder: Path, square: Callable[[int], np.ndarray]) -> None:
    """Write `report.html` of a finished run anew, after what its folder holds; nothing for one that
    is under way or ended early. square: as in `write_report`. Raises CheckpointError and DiskError.
    """
    if not (folder / "report.html").is_file():
        return
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    state, _ = checkpoint.load_newest(folder / "checkpoints")
    del config["command"]
    write_report(
        folder,
        config=config,
        summary=summary,
        history=state["history"],
        confusion=state["best"] and state["best"]["confusion"],
        classes=summary["classes"],
        square=square,
    )


def _run_facts(page: Page, summary: Mapping[str, object], history: History) -> None:
    backend, reason = summary.get("backend"), summary.get("backend_reason")
    speed, seconds = summary.get("images_per_second"), summary.get("seconds")
    epochs = [row["seconds"] for row in history if row.get("seconds") is not None]
    page.facts(
        {
            "Model": summary.get("model"),
            "Parameters": summary.get("parameters"),
            "Trainable parameters": summary.get("trainable_parameters"),
            "Device": summary.get("device"),
            "Backend": f"{backend} ({reason})" if reason else backend,
            "Training speed": None if speed is None else f"{speed:.1f} images/s",
            "Training, median epoch": f"{np.median(epochs):.1f} s" if epochs else None,
            "Duration": None if seconds is None else _duration(seconds),
            "Seed": str(summary.get("seed")),
        }
    )
    if summary.get("best_val_accuracy") is not None:
        page.text(
            "The best epoch was chosen on the same photos it is measured on, so its accuracy is"
            " slightly flattered; photos kept aside until the end would tell exactly."
        )


def _attempt(page: Page, what: str, part: Callable[..., Any], *arguments: object) -> Any:
    """What `part` returns, or None and a note on the page: none of it may end a training."""
    try:
        return part(*arguments)
    except Exception as error:
        warnings.warn(f"report.html: {what.lower()} cannot be shown ({error})", stacklevel=1)
        page.note("warn", f"{what} cannot be shown: {error}.")
        return None


def _known(
    folder: Path, confusion: Sequence[Sequence[int]] | np.ndarray | None
) -> tuple[Validation, Scores] | None:
    """The folder's validation.csv, and what it is worth; None without one. Raises CheckpointError
    where it is not that of `confusion`."""
    found = None if confusion is None else read_validation(folder)
    if found is None:
        return None
    scores = score(found.probability, found.labels, found.pictures)
    if not np.array_equal(scores.confusion, confusion):
        raise CheckpointError(f"{folder / VALIDATION} is not of the best epoch")
    return found, scores


def _curves(page: Page, history: History, folder: Path) -> None:
    plot_curves(history, folder / "curves.png")
    page.figure(
        folder / "curves.png",
        "Loss, accuracy and the overfitting monitor: a gap that keeps opening means the model"
        " learns its training photos by heart. The ring marks the best validation accuracy.",
        "Training and validation loss and accuracy by epoch, and their differences.",
        plot=True,
    )


def _calibration(page: Page, folder: Path, checked: Validation, scores: Scores) -> None:
    """The calibration, and what becomes of it where the network predicts."""
    logits = np.log(checked.probability.clip(1e-30))
    temperature = fit_temperature(logits, checked.labels)
    _, error = calibration(probabilities(logits, temperature), checked.labels)
    add_calibration(
        page,
        scores,
        folder,
        f" `train.predict` divides the logits by {temperature:.2f}, fitted on these very photos,"
        f" after which it is {percent(error)}.",
    )


def _batch(page: Page, folder: Path) -> None:
    page.section("Training batch")
    page.figure(
        folder / "batch.png",
        "The first training batch as the network sees it, augmented and mixed; where two photos"
        " are mixed, their shares stand below.",
        "Photos of the first training batch with their classes.",
    )


def _mistakes(
    page: Page, folder: Path, checked: Validation, square: Callable[[int], np.ndarray]
) -> None:
    trained = load_trained(folder, torch.device("cpu"), None)
    add_mistakes(
        page,
        trained,
        checked.probability,
        checked.labels,
        checked.files,
        checked.pictures,
        square,
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
            for name, value in flat(split)
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


def flat(mapping: Mapping[str, object]) -> list[tuple[str, object]]:
    """Names and values of nested mappings in order; flags are flat, so names do not collide."""
    pairs: list[tuple[str, object]] = []
    for name, value in mapping.items():
        pairs.extend(flat(value) if isinstance(value, Mapping) else [(name, value)])
    return pairs


def _label(name: str) -> str:
    return name.replace("_", " ")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

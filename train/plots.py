"""The pictures of a run folder: curves and the confusion matrix, as PNG files.

Drawn with matplotlib's object interface (no global state, no display), dark ink on white, at a
resolution that `Page.figure(plot=True)` reads as their size on the page.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.files import write_atomically
from train.metrics import Bin

INK, SOFT, GRID = "#23211d", "#6b665c", "#e4e0d6"
TRAIN, VALIDATION = "#c8672b", "#22578f"  # told apart by colour-blind readers and in grey
# of several networks, told apart by colour-blind readers (Okabe and Ito); dashes tell the rest
COLOURS = (VALIDATION, TRAIN, "#2f7d55", "#8a2f5a", "#7a6a1f", "#5b5b5b")
DASHES = ("-", "--", ":", "-.")
MANY_CLASSES = 30  # from here on cells shrink, zeros stay empty and the resolution drops


def plot_curves(history: Sequence[Mapping[str, float | None]], path: Path) -> None:
    """Draw loss, accuracy and the overfitting monitor (train minus validation) by epoch.

    `history` has a mapping an epoch: epoch, train_loss, train_accuracy (0..1) and val_loss,
    val_accuracy, which are None without validation. Raises `DiskError` when `path` is unwritable.
    """
    figure = Figure(figsize=(9.6, 3.1), layout="constrained", facecolor="white")
    loss, accuracy, monitor = figure.subplots(1, 3)
    epochs = _series(history, "epoch")
    train_loss, val_loss = _series(history, "train_loss"), _series(history, "val_loss")
    train_accuracy = 100 * _series(history, "train_accuracy")
    val_accuracy = 100 * _series(history, "val_accuracy")

    for axes, title, train, validation in (
        (loss, "Loss", train_loss, val_loss),
        (accuracy, "Accuracy (%)", train_accuracy, val_accuracy),
    ):
        style_axes(axes, title)
        _line(axes, epochs, train, TRAIN, "train")
        if np.isfinite(validation).any():
            _line(axes, epochs, validation, VALIDATION, "validation")
        if len(epochs):
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    _cut_spikes(loss, epochs, np.fmax(train_loss, val_loss))
    if np.isfinite(val_accuracy).any():
        best = int(np.nanargmax(val_accuracy))
        accuracy.plot(
            epochs[best], val_accuracy[best], "o", ms=9, mfc="none", mec=VALIDATION, mew=1.2
        )
    _draw_monitor(monitor, epochs, train_loss - val_loss, train_accuracy - val_accuracy)
    _save(figure, path, dpi=192)


def plot_runs(histories: Mapping[str, Sequence[Mapping[str, float | None]]], path: Path) -> None:
    """Draw loss and accuracy of several runs by epoch: a colour a run, in training thin.

    histories: {name: a mapping an epoch, as for `plot_curves`}.
    """
    figure = Figure(figsize=(9.6, 3.6), layout="constrained", facecolor="white")
    loss, accuracy = figure.subplots(1, 2)
    for axes, title, name, scale in (
        (loss, "Loss, in training thin", "loss", 1),
        (accuracy, "Accuracy (%), in training thin", "accuracy", 100),
    ):
        style_axes(axes, title)
        for number, (label, history) in enumerate(histories.items()):
            colour = COLOURS[number % len(COLOURS)]
            dash = DASHES[number // len(COLOURS) % len(DASHES)]
            epochs = _series(history, "epoch")
            for side, width, alpha in (("train", 0.9, 0.65), ("val", 1.9, 1)):
                values = scale * _series(history, f"{side}_{name}")
                (line,) = axes.plot(epochs, values, dash, color=colour, lw=width, alpha=alpha)
                if np.isfinite(values).sum() == 1:
                    line.set_marker("o")
            line.set_label(label)
    if histories:
        legend = accuracy.legend(frameon=False, fontsize=8, labelcolor=INK)
        for text in legend.get_texts():
            text.set_parse_math(False)
    _save(figure, path, dpi=192)


def plot_confusion(
    matrix: Sequence[Sequence[int]] | np.ndarray, classes: Sequence[str], path: Path
) -> None:
    """Draw counts `[true class, predicted class]`, coloured by the share of the true class.

    Raises `ValueError` when `matrix` is not square with a row a class.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    total = len(classes)
    if counts.shape != (total, total):
        raise ValueError(f"confusion matrix of shape {counts.shape} for {total} classes")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    many = total > MANY_CLASSES
    cell, font = (0.21, 5.5) if many else (0.42, 8)
    side = max(total * cell, 2.4)
    longest = max((len(name) for name in classes), default=0)
    labels = min(longest, 24) * font * 0.0085 + 0.5  # inches that the class names take
    figure = Figure(figsize=(side + labels, side + labels), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [_shorten(name) for name in classes]
    # A dollar sign in a class name is no formula.
    if many or longest > 14:
        axes.set_xticks(range(total), names, rotation=90, fontsize=font, parse_math=False)
    else:
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(total), names, **slanted, fontsize=font, parse_math=False)
    axes.set_yticks(range(total), names, fontsize=font, parse_math=False)
    axes.set_xlabel("predicted", color=SOFT, fontsize=9)
    axes.set_ylabel("true", color=SOFT, fontsize=9)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(total + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(total + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=GRID, linewidth=0.4 if many else 1)
    axes.tick_params(which="minor", length=0)
    for row, column in np.ndindex(total, total):
        if counts[row, column] or not many:
            dark = shares[row, column] > 0.55
            tone = "white" if dark else INK if counts[row, column] else "#b5b0a5"
            text = f"{counts[row, column]}"
            axes.text(column, row, text, ha="center", va="center", fontsize=font, color=tone)
    _save(figure, path, dpi=120 if many else 192)


def plot_calibration(bins: Sequence[Bin], path: Path) -> None:
    """Draw accuracy over confidence, the area of a point in proportion to its photos."""
    figure = Figure(figsize=(4.2, 3.9), layout="constrained", facecolor="white")
    axes = figure.subplots()
    style_axes(axes, "Accuracy over confidence (%)", "confidence (%)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.plot((0, 100), (0, 100), "--", color=SOFT, linewidth=1, label="as often right as sure")
    total = sum(one.images for one in bins)
    confidence, accuracy = (
        [100 * getattr(b, name) for b in bins] for name in ("confidence", "accuracy")
    )
    sizes = [20 + 400 * one.images / total for one in bins]
    axes.plot(confidence, accuracy, color=VALIDATION, linewidth=1.2)
    axes.scatter(confidence, accuracy, sizes, color=VALIDATION, alpha=0.75, linewidths=0)
    axes.set(xlim=(0, 103), ylim=(0, 103))
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    _save(figure, path, dpi=192)


def _draw_monitor(axes: Axes, epochs: np.ndarray, loss: np.ndarray, accuracy: np.ndarray) -> None:
    """Differences on two scales that share their zero: below it the loss, above it the accuracy
    of a model that has learnt its training photos by heart."""
    style_axes(axes, "Overfitting monitor: train \u2212 validation")
    if not np.isfinite(loss).any():
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no validation", ha="center", va="center", color=SOFT, fontsize=9)
        return
    other = axes.twinx()
    style_axes(other, "")
    other.grid(False)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    lines = [
        _line(axes, epochs, loss, "#8a2f5a", "loss difference (left)"),
        _line(other, epochs, accuracy, "#2f7d55", "accuracy gap, points (right)", dashed=True),
    ]
    for scale, values, least in ((axes, loss, 0.05), (other, accuracy, 2.0)):
        reach = max(_usual_reach(np.abs(values)) * 1.45, least)  # room for the legend
        scale.set_ylim(-reach, reach)
    axes.legend(
        handles=lines, frameon=False, fontsize=8, labelcolor=INK, loc="lower left", borderpad=0
    )


def _usual_reach(values: np.ndarray) -> float:
    """The largest value, or twice the 85th percentile where a spike would flatten the rest."""
    return float(min(np.nanmax(values), 2 * np.nanpercentile(values, 85)))


def _cut_spikes(axes: Axes, epochs: np.ndarray, highest: np.ndarray) -> None:
    """Leave spikes, as of cold batch statistics, out of the scale and write their height."""
    if not np.isfinite(highest).any() or _usual_reach(highest) == np.nanmax(highest):
        return
    axes.set_ylim(0, _usual_reach(highest))
    peak = int(np.nanargmax(highest))
    axes.annotate(
        f"{highest[peak]:.3g}",
        (epochs[peak], 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, -9),
        ha="center",
        textcoords="offset points",
        fontsize=7.5,
        color=SOFT,
    )


def _series(history: Sequence[Mapping[str, float | None]], key: str) -> np.ndarray:
    """A value an epoch, NaN where it is None."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in history], dtype=float)


def _line(
    axes: Axes, epochs: np.ndarray, values: np.ndarray, color: str, label: str, dashed: bool = False
):
    marker = "o" if len(epochs) <= 40 else None
    style = "--" if dashed else "-"
    (line,) = axes.plot(
        epochs, values, style, color=color, label=label, linewidth=1.7, marker=marker, ms=3.2
    )
    return line


def style_axes(axes: Axes, title: str, xlabel: str = "epoch") -> None:
    """The look of every plot: a title on the left, horizontal lines, whole numbers below."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlabel(xlabel, color=SOFT, fontsize=8.5)
    axes.tick_params(labelsize=8, colors=SOFT, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=GRID)


def _shorten(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "\u2026"


def png(figure: Figure, dpi: int = 192) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _save(figure: Figure, path: Path, dpi: int) -> None:
    write_atomically(path, png(figure, dpi))

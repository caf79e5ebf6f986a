"""The pictures of the doctor's evidence, as PNG bytes for a page."""

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from train.doctor.measures import log_classes
from train.doctor.signals import Signals
from train.metrics import auc_interval
from train.plots import INK, MANY_CLASSES, SOFT, TRAIN, VALIDATION, png, style_axes

FIRST, LAST = "#b5b0a5", TRAIN


def loss_figure(signals: Signals) -> bytes | None:
    """Loss by step, and the size of the updates."""
    loss = signals.per_step("loss")
    if not np.isfinite(loss).any():
        return None
    figure, (left, right) = _figure(2)
    style_axes(left, "Training loss", "step")
    steps = np.arange(1, loss.size + 1)
    left.plot(steps, loss, color=FIRST, linewidth=0.7, label="each step")
    width = max(1, loss.size // 40)
    if width > 1:
        middle = [np.nanmedian(loss[i : i + width]) for i in range(0, loss.size, width)]
        left.plot(steps[::width] + width / 2, middle, color=TRAIN, linewidth=1.8, label="median")
    clean = [(p["step"], p["clean_loss"]) for p in signals.probes if p["clean_loss"] is not None]
    if clean:
        left.plot(*zip(*clean, strict=True), "o", ms=4, color=VALIDATION, label="clean images")
    left.axhline(log_classes(signals), color=SOFT, linewidth=0.9, linestyle=":", label="guessing")
    seen = loss[np.isfinite(loss)]
    left.set_ylim(0, min(seen.max(), 3 * np.percentile(seen, 80)) * 1.05)
    left.legend(frameon=False, fontsize=8, labelcolor=INK)
    style_axes(right, "Update of a step / weights, by layer", "step")
    updates = [p for p in signals.probes if p["layers"]["update"]]
    if updates:
        values = np.array([signals.layers(p, "update") for p in updates])
        at = [p["step"] for p in updates]
        right.fill_between(at, values.min(1), values.max(1), color=TRAIN, alpha=0.18, linewidth=0)
        right.plot(at, np.median(values, 1), "o-", ms=3.5, color=TRAIN, linewidth=1.7)
        if (values > 0).any():
            right.set_yscale("log", nonpositive="mask", subs=[])
    return png(figure)


def depth_figure(signals: Signals) -> bytes | None:
    """Gradient over weight norm by depth, of the first and the last probe."""
    if not signals.probes:
        return None
    figure, (axes,) = _figure(1)
    style_axes(axes, "Gradient norm / weight norm", "layer, from the image to the classes")
    for probe, color in _ends(signals):
        ratio = signals.layers(probe, "gradient") / signals.layers(probe, "weight").clip(1e-12)
        label = f"after {probe['step']} steps"
        axes.plot(range(1, ratio.size + 1), ratio, "o-", ms=3.5, color=color, label=label)
        if (ratio > 0).any():
            axes.set_yscale("log", nonpositive="mask", subs=[])
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return png(figure)


def dead_figure(signals: Signals) -> bytes | None:
    """Share of dead channels of each activation, of the first and the last probe."""
    if not signals.probes or not any("dead" in u for u in signals.probes[-1]["units"].values()):
        return None
    figure, (axes,) = _figure(1)
    style_axes(axes, "Channels that are 0 on every image (%)", "")
    for number, (probe, color) in enumerate(_ends(signals)):
        units = {name: unit["dead"] for name, unit in probe["units"].items() if "dead" in unit}
        places = np.arange(len(units)) + 0.4 * number - 0.2
        label = f"after {probe['step']} steps"
        axes.bar(places, [100 * v for v in units.values()], 0.38, color=color, label=label)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(len(units)), list(units), rotation=60, ha="right", fontsize=7)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return png(figure)


def classes_figure(signals: Signals) -> bytes | None:
    """Area under the ROC curve of every class with its interval, of the latest evaluation."""
    epochs = [epoch for epoch in signals.epochs if epoch.get("auc")]
    names = signals.start["classes"]
    if not epochs or len(names) > MANY_CLASSES:
        return None
    figure = Figure(figsize=(6.4, 0.9 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "Area under the ROC curve, each class against the rest", "")
    axes.xaxis.set_major_locator(MultipleLocator(0.1))
    total, counts = epochs[-1]["val_images"], signals.start["val_counts"]
    for row, (area, count) in enumerate(zip(epochs[-1]["auc"], counts, strict=True)):
        if area is not None:
            low, high = auc_interval(area, count, total - count)
            axes.plot([low, high], [row, row], color=VALIDATION, linewidth=2, alpha=0.5)
            axes.plot(area, row, "o", ms=5, color=VALIDATION)
    axes.axvline(0.5, color=SOFT, linewidth=0.9, linestyle=":")
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    return png(figure)


def gap_figure(signals: Signals) -> bytes | None:
    """Accuracy on clean training images against validation."""
    epochs = [e for e in signals.epochs if e.get("val_accuracy") is not None]
    if not epochs:
        return None
    figure, (axes,) = _figure(1)
    style_axes(axes, "Accuracy (%)", "step")
    at = [e["step"] for e in epochs]
    running = [100 * (e["train_accuracy"] or 0) for e in epochs]
    axes.plot(at, running, "--", color=TRAIN, linewidth=1.2, label="train, as it is fed")
    val = [100 * e["val_accuracy"] for e in epochs]
    axes.plot(at, val, color=VALIDATION, linewidth=1.8, label="validation")
    clean = [(p["step"], 100 * p["clean_accuracy"]) for p in signals.probes]
    axes.plot(*zip(*clean, strict=True), "o", ms=4.5, color=TRAIN, label="train, clean, eval mode")
    batch = [(p["step"], 100 * p["batch_accuracy"]) for p in signals.probes if "disagree" in p]
    if batch:
        label = "the same with the images' own statistics"
        axes.plot(*zip(*batch, strict=True), "s", ms=4.5, mfc="none", color="#2f7d55", label=label)
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return png(figure)


FIGURES: dict[str, tuple[Callable[[Signals], bytes | None], str]] = {
    "loss": (
        loss_figure,
        "Left: the loss of every step, its median, and the loss on the doctor's clean training"
        " images. Right: how much one step changes the weights (median and range over the layers);"
        " 1e-3 is usual, from 1e-1 on it destroys.",
    ),
    "depth": (
        depth_figure,
        "How much gradient each layer receives for the size of its weights: a healthy network is"
        " nearly level.",
    ),
    "dead": (dead_figure, "Dead channels by layer: they have no gradient and do not come back."),
    "classes": (classes_figure, "0.5 is a coin; the bars are 95 % intervals."),
    "gap": (
        gap_figure,
        "What the network knows of its training photos, measured as validation is, and of others.",
    ),
}


def _figure(panels: int) -> tuple[Figure, list]:
    figure = Figure(figsize=(4.8 * panels + 1.6 * (panels == 1), 3.1), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


def _ends(signals: Signals) -> list[tuple[dict, str]]:
    pairs = [(signals.probes[0], FIRST), (signals.probes[-1], LAST)]
    return pairs if len(signals.probes) > 1 else pairs[1:]

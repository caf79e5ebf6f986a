"""The pictures of a study that no single run has: PNG files in the manner of `train.plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from train.files import write_atomically
from train.plots import COLOURS, DASHES, GRID, INK, SOFT, png, style_axes


def plot_cost(
    points: Mapping[str, Mapping[str, float | None]],
    labels: Mapping[str, str],
    path: Path,
    accuracy_label: str,
) -> None:
    """Accuracy against each cost, one panel a cost.

    points: {model: {"accuracy": .., "low": .., "high": .., cost: ..}}; accuracies are 0..1. labels:
    {cost: what the axis says}. The models that no other beats in both lie on the line.
    """
    figure = Figure(figsize=(9.6, 3.6), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(labels), squeeze=False)[0]
    for axes, (cost, label) in zip(panels, labels.items(), strict=True):
        style_axes(axes, "", label)
        axes.grid(axis="both", color=GRID, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        shown = {name: one for name, one in points.items() if one[cost] is not None}
        front = [shown[name] for name in pareto(shown, cost)]
        axes.plot(
            [one[cost] for one in front],
            [100 * one["accuracy"] for one in front],
            color=SOFT,
            linewidth=1,
            zorder=1,
        )
        for number, (name, one) in enumerate(points.items()):
            if one[cost] is None:
                continue
            x, y = one[cost], 100 * one["accuracy"]
            colour = COLOURS[number % len(COLOURS)]
            if one["low"] is not None:
                axes.plot([x, x], [100 * one["low"], 100 * one["high"]], color=colour, alpha=0.5)
            axes.plot(x, y, "o", color=colour, ms=6, label=name)
        lows = [100 * one["accuracy"] for one in shown.values()]
        if lows:  # an interval of two runs may reach far beyond every accuracy
            reach = max(max(lows) - min(lows), 10)
            axes.set_ylim(max(0, min(lows) - reach), min(100, max(lows) + reach))
        axes.margins(x=0.25)
    panels[0].set_ylabel(f"{accuracy_label} (%)", color=SOFT, fontsize=8.5)
    panels[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="best")
    write_atomically(path, png(figure))


def pareto(points: Mapping[str, Mapping[str, float]], cost: str) -> list[str]:
    """The models for which no other is both as cheap and more accurate, the cheapest first."""
    front, best = [], -1.0
    for name in sorted(points, key=lambda name: (points[name][cost], -points[name]["accuracy"])):
        if points[name]["accuracy"] > best:
            best = points[name]["accuracy"]
            front.append(name)
    return front


def plot_depth(
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    blocks: Sequence[str],
    label: str,
    path: Path,
    *,
    log: bool = False,
) -> None:
    """A quantity by depth: one panel a moment of training, in it one line a model.

    panels: {title: {model: a value a block, None where there is none}}; blocks: their names.
    """
    figure = Figure(figsize=(9.6, 3.4), layout="constrained", facecolor="white")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        style_axes(axes, title, "")
        for number, (name, values) in enumerate(lines.items()):
            y = np.array([np.nan if value is None else value for value in values])
            y[y <= 0 if log else np.isnan(y)] = np.nan
            there = np.isfinite(y)
            axes.plot(
                np.flatnonzero(there),
                y[there],
                DASHES[number // len(COLOURS) % len(DASHES)],
                color=COLOURS[number % len(COLOURS)],
                label=name,
                linewidth=1.6,
                marker="o",
                ms=3,
            )
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        step = -(-len(blocks) // 5)
        axes.set_xticks(range(0, len(blocks), step), blocks[::step], fontsize=7, rotation=30)
    all_axes[0].set_ylabel(label, color=SOFT, fontsize=8.5)
    all_axes[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    write_atomically(path, png(figure))

"""The pictures of a speed report, as PNG files: times and memory as bars with intervals, every room
under the measured roofs, and our time over the commits. Dark ink on white, as `train.plots` draws.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from profiling import agree, rows
from profiling.roofline import Roofs
from train.plots import GRID, INK, SOFT

OURS, RIVAL, BASE, FALSE = "#c8672b", "#22578f", "#6b665c", "#c9c3b6"
DPI = 192
WIDTH = 7.2  # inches; the page lets it scroll on a phone rather than shrink
MARKS = {
    "reference": ("eager", "o", BASE),
    "compile": ("compiled", "^", RIVAL),
    "fused": ("ours", "D", OURS),
}


@dataclass(frozen=True)
class Bar:
    """A value with its interval, what is written beside it, and its colour."""

    name: str
    value: float
    low: float
    high: float
    text: str
    color: str


def draw_bars(groups: Sequence[tuple[str, Sequence[Bar]]], unit: str) -> bytes:
    """Horizontal bars, a panel a group with its own scale; the whiskers are low and high."""
    heights = [0.62 + 0.25 * len(bars) for _, bars in groups]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, bars) in zip(panels, groups, strict=True):
        _draw_panel(axes, title, bars, unit)
    return _png(figure)


def _draw_panel(axes: Axes, title: str, bars: Sequence[Bar], unit: str) -> None:
    _style(axes, f"{title} ({unit})")
    places = range(len(bars))
    values = np.array([bar.value for bar in bars])
    axes.barh(places, values, 0.66, color=[bar.color for bar in bars])
    reach = np.array([[bar.value - bar.low, bar.high - bar.value] for bar in bars]).T
    if reach.any():
        axes.errorbar(values, places, xerr=reach.clip(0), fmt="none", ecolor=INK, elinewidth=1,
                      capsize=2)  # fmt: skip
    axes.set_yticks(places, [bar.name for bar in bars], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    for place, bar in zip(places, bars, strict=True):
        axes.annotate(
            bar.text, (max(bar.value, bar.high), place), xytext=(5, 0), va="center",
            textcoords="offset points", fontsize=7.5, color=INK,
        )  # fmt: skip
    axes.set_xlim(0, max(max(bar.value, bar.high) for bar in bars) * 1.45)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.8)


def draw_roofline(measured: Sequence[rows.Row], roofs: Roofs) -> bytes | None:
    """TFLOP/s of every room over its FLOPs a byte, both directions, under the roofs that were
    measured on its device (Williams, Waterman and Patterson 2009); None without any room.

    A hollow mark is one whose numbers were wrong; its time is no result.
    """
    points = [
        (row["provider"], float(row["tflop_per_s"]), float(row["gb_per_s"]), row["numerics"])
        for row in measured
        if row["tflop_per_s"] and row["device"] == roofs.device and float(row["tflop_per_s"]) > 0
    ]
    if not points:
        return None
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    _style(axes, "Work and memory traffic under the measured roofs")
    intensity = np.array([1e3 * tflops / gb for _, tflops, gb, _ in points])
    ridge = roofs.matmul_tflop_s / roofs.copy_gb_s * 1e3
    span = np.geomspace(min(intensity.min(), ridge) / 2, max(intensity.max(), ridge) * 3, 200)
    for gb, style, name in ((roofs.copy_gb_s, "-", "memory"), (roofs.l2_gb_s, ":", "cache")):
        if gb:
            roof = np.minimum(gb * span * 1e-3, roofs.matmul_tflop_s)
            named = f"{name}, {gb:,.0f} GB/s, up to {roofs.matmul_tflop_s:,.3g} TFLOP/s"
            axes.plot(span, roof, style, color=INK, linewidth=1.2, label=named)
    for provider in dict.fromkeys(name for name, *_ in points):
        name, marker, color = MARKS.get(provider, (provider, "s", "#2f7d55"))
        for right in (True, False):
            chosen = [
                (x, one[1])
                for x, one in zip(intensity, points, strict=True)
                if one[0] == provider and (one[3] == agree.OK) == right
            ]
            if chosen:
                x, y = zip(*chosen, strict=True)
                axes.scatter(
                    x, y, 26, marker=marker, facecolor=color if right else "none", edgecolor=color,
                    alpha=0.85, label=name if right else f"{name}, wrong numbers",
                )  # fmt: skip
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("FLOPs a byte that must move", color=SOFT, fontsize=8.5)
    axes.set_ylabel("TFLOP/s", color=SOFT, fontsize=8.5)
    axes.grid(color=GRID, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    return _png(figure)


def draw_history(lines: Sequence[tuple[str, Sequence[tuple[str, float, float, float]]]]) -> bytes:
    """Our microseconds an image by commit: a line for each job of (commit, median, quartiles)."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained", facecolor="white")
    axes = figure.subplots()
    _style(axes, "Ours, us an image, by commit")
    commits = list(dict.fromkeys(commit for _, points in lines for commit, *_ in points))
    colors = (OURS, RIVAL, "#2f7d55", "#8a2f5a", BASE)
    for index, (name, points) in enumerate(lines):
        places = [commits.index(commit) for commit, *_ in points]
        median, low, high = (np.array(part) for part in list(zip(*points, strict=True))[1:])
        axes.errorbar(
            places, median, yerr=[median - low, high - median], fmt="o-", ms=4, linewidth=1.5,
            capsize=2, color=colors[index % len(colors)], label=name,
        )  # fmt: skip
    axes.set_xticks(range(len(commits)), commits, fontsize=8)
    axes.set_xlim(-0.5, len(commits) - 0.5)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return _png(figure)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK, parse_math=False)
    axes.tick_params(which="both", labelsize=8, colors=SOFT, length=0)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=GRID)


def _png(figure: Figure) -> bytes:
    """The picture in 64 colours: a third of the bytes, and nobody sees it."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(64).save(packed, "PNG", optimize=True, dpi=(DPI, DPI))
    return packed.getvalue()

"""The picture of a profile: one step on its timeline, and what every layer takes of a step."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from profiling.nvtx import DETAIL
from profiling.ranges import STEP, Nesting, Opened, Summary, Trace
from train.files import write_atomically
from train.plots import GRID, INK, SOFT

PHASES = {
    "data": ("#8b867b", "#aaa599"),
    "forward": ("#22578f", "#6f9cc8"),
    "backward": ("#c8672b", "#e3a579"),
    "optimizer": ("#2f7d55", "#7fb898"),
    "other": ("#5c5870", "#908ca6"),
}
LABELLED = 0.035  # share of the width that a bar needs to be named


def plot_profile(trace: Trace, summary: Summary, path: Path) -> None:
    """Draw both pictures into `path`, a PNG. Raises DiskError when that cannot be written."""
    layers = layer_times(summary)
    height = 0.27 * max(len(layers), 1) + 0.9
    figure = Figure(figsize=(8.8, 2.6 + height), layout="constrained", facecolor="white")
    timeline, shares = figure.subplots(2, 1, height_ratios=[2.6, height])
    _draw_step(timeline, trace)
    _draw_layers(shares, layers, summary)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=192)
    write_atomically(path, buffer.getvalue())


def layer_times(summary: Summary) -> dict[str, dict[str, float]]:
    """Milliseconds a step of every layer: {phase: time}. "rest" is the phases' own work outside of
    layers, and as "other" the step's outside of phases."""
    what = "host" if summary.device == "none" else "device"
    times = {row.path: getattr(row, what) / max(summary.steps, 1) / 1e6 for row in summary.rows}
    phases = [path for path in times if len(path) == 2 and path[0] == STEP]
    layers = [path for path in times if len(path) == 3 and path[:2] in phases]
    found: dict[str, dict[str, float]] = {}
    for path in layers:
        found.setdefault(path[2], {})[path[1]] = times[path]
    if phases:
        rest = {path[1]: times[path] for path in phases}
        for path in layers:
            rest[path[1]] -= times[path]
        rest["other"] = times[STEP,] - sum(times[path] for path in phases)
        found["rest"] = {phase: max(time, 0.0) for phase, time in rest.items()}
    return found


def _draw_step(axes: Axes, trace: Trace) -> None:
    nesting = Nesting(trace.ranges)
    steps = [o for o in nesting.all() if _name(o) == STEP]
    if not steps:
        axes.set_axis_off()
        return
    step = sorted(steps, key=lambda o: o.range.end - o.range.start)[len(steps) // 2]
    inside = [o for o in nesting.all() if o is not step and _within(o, step)]
    kernels = [k for k in trace.kernels if _belongs(nesting.find(k.thread, k.launched), step)]
    begin = step.range.start
    end = max([step.range.end, *(kernel.end for kernel in kernels)])
    depth = max([len(o.path) - len(step.path) for o in inside], default=0)
    lanes = ["step", "phases", "layers", *(f"depth {n}" for n in range(3, depth + 1))][: depth + 1]
    counts = [0] * (depth + 1)
    for opened in (step, *inside):
        lane = len(opened.path) - len(step.path)
        counts[lane] += 1
        colours = PHASES[_phase(opened)]
        tone = colours[counts[lane] % 2] if lane > 1 else colours[0]
        _bar(axes, lane, opened.range.start - begin, opened.range.end - begin, end - begin, tone)
        if opened.range.end - opened.range.start > LABELLED * (end - begin):
            middle = (opened.range.start + opened.range.end) / 2 - begin
            axes.text(
                middle / 1e6,
                lane,
                _name(opened),
                ha="center",
                va="center",
                fontsize=7,
                color="white",
                clip_on=True,
                parse_math=False,
            )
    if kernels:
        for kernel in kernels:
            owner = nesting.find(kernel.thread, kernel.launched)
            tone = PHASES[_phase(owner)][0]
            _bar(axes, depth + 1, kernel.start - begin, kernel.end - begin, end - begin, tone)
        lanes.append("operators" if trace.device == "CPU" else "GPU")
    axes.set_yticks(range(len(lanes)), lanes, fontsize=8, color=INK)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(0, (end - begin) / 1e6)
    _style(axes, "One step", "milliseconds")


def _within(opened: Opened, step: Opened) -> bool:
    return _belongs(opened.parent, step)


def _belongs(opened: Opened | None, step: Opened) -> bool:
    while opened is not None and opened.range != step.range:
        opened = opened.parent
    return opened is not None


def _name(opened: Opened) -> str:
    return opened.range.text.split(DETAIL)[0]


def _phase(opened: Opened) -> str:
    return next((name for name in opened.path if name in PHASES), "other")


def _bar(axes: Axes, lane: int, start: int, end: int, whole: int, colour: str) -> None:
    least = whole / 1500  # what a pixel shows
    axes.barh(lane, max(end - start, least) / 1e6, 0.78, left=start / 1e6, color=colour)


def _draw_layers(axes: Axes, layers: dict[str, dict[str, float]], summary: Summary) -> None:
    if set(layers) <= {"rest"}:
        axes.set_axis_off()
        text = "layers are not visible in the step's CUDA graph: --no-graph shows them"
        axes.text(0.5, 0.5, text, ha="center", va="center", color=SOFT, fontsize=9)
        return
    names = list(layers)
    left = [0.0] * len(names)
    whole = sum(sum(times.values()) for times in layers.values())
    for phase in PHASES:
        values = [layers[name].get(phase, 0.0) for name in names]
        if any(values):
            axes.barh(names, values, 0.72, left=left, color=PHASES[phase][0], label=phase)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for number, total in enumerate(left):
        share = f" {100 * total / whole:.1f} %" if whole else ""
        axes.text(total, number, share, va="center", fontsize=7.5, color=SOFT)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.08 * max(left) or 1)
    axes.tick_params(axis="y", labelsize=8, labelcolor=INK)
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 5, "columnspacing": 1.2}
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, borderpad=0, **above)
    kind = {"GPU": "GPU time", "CPU": "time in operators", "none": "host time"}[summary.device]
    _style(axes, f"Where a step's {kind} goes", f"milliseconds a step, mean of {summary.steps}")


def _style(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(label, color=SOFT, fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8, colors=SOFT)
    axes.tick_params(length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)

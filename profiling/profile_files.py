"""What a profile leaves in a folder, and what it prints: profile.json, profile.png, profile.html.

`train.profile_section` reads the first two; a run's report.html shows them.
"""

import json
from pathlib import Path

from profiling.ranges import Row, Summary, Trace, difference, summarise
from profiling.timeline import plot_profile
from train.errors import FOREIGN, DataError
from train.page import Page
from train.profile_section import INDENT, add_profile
from train.record import opened, write_json


def write_profile(folder: Path, trace: Trace, source: str) -> Summary:
    """Summarise the trace into profile.json and profile.png. Raises DataError, DiskError."""
    summary = summarise(trace)
    folder.mkdir(parents=True, exist_ok=True)
    plot_profile(trace, summary, folder / "profile.png")
    write_json(folder / "profile.json", {"source": source, **summary.to_dict()})
    return summary


def read_profile(folder: Path) -> Summary:
    """The summary in a folder. Raises DataError when there is none."""
    path = folder / "profile.json"
    try:
        return Summary.from_dict(opened(json.loads(path.read_bytes())))
    except FOREIGN as error:
        raise DataError(
            f"{path} is no profile: run `python -m profiling.nsys --out {folder} -- ...` first"
        ) from error


def write_page(folder: Path, command: str, old: Summary | None = None, old_name: str = "") -> None:
    """Write profile.html from the files in `folder`, with the difference to an older profile."""
    page = Page("Profile of a training step")
    add_profile(page, folder)
    new = read_profile(folder)
    for step in _step(new):
        if step.top:
            page.section("Kernels")
            page.table(
                ("kernel", "a step", "ms", "of the step"),
                [
                    (
                        name,
                        f"{count / new.steps:.4g}",
                        _ms(ns, new),
                        f"{100 * ns / step.device:.1f} %",
                    )
                    for name, count, ns in step.top
                ],
                "The kernels that take most of a step.",
            )
    if old is not None:
        page.section(f"Against {old_name}")
        page.table(
            ("range", "before, ms", "now, ms", "difference, ms", "times as fast"),
            [
                (INDENT * (len(path) - 1) + path[-1], *_cells(before, after))
                for path, before, after in difference(old, new)
            ],
            "Means a step; a range that only one of the two runs has is compared with nothing.",
        )
    page.section("Reproduce")
    page.command(command)
    page.write(folder / "profile.html")


def describe(summary: Summary) -> str:
    """The summary as a table for the terminal, times in milliseconds a step."""
    kind = {"GPU": "GPU", "CPU": "operators", "none": "host"}[summary.device]
    traced = summary.device != "none"
    heads = (kind, "share", "kernels", "gaps", "host") if traced else (kind, "share")
    lines = [f"{'range, ms a step':24} {'shape':18}" + "".join(f" {head:>9}" for head in heads)]
    for row in summary.rows:
        name = "  " * (len(row.path) - 1) + row.path[-1]
        share = "-" if row.share is None else f"{row.share:.1%}"
        cells = [_ms(row.device if traced else row.host, summary), share]
        if traced:
            launches = f"{row.kernels / max(summary.steps, 1):.4g}"
            cells += [launches, _ms(row.gaps, summary), _ms(row.host, summary)]
        lines.append(f"{name:24} {row.shape:18}" + "".join(f" {cell:>9}" for cell in cells))
    for step in _step(summary):
        for name, count, ns in step.top:
            lines.append(f"  {_ms(ns, summary):>9} ms  {count / summary.steps:6.4g} x  {name[:80]}")
    if summary.outside:
        lines.append(f"{summary.outside} kernels were launched outside of every range")
    return "\n".join(lines)


def describe_difference(old: Summary, new: Summary) -> str:
    """The change of every range from one profile to another, in milliseconds a step."""
    lines = [f"{'range':28} {'before':>10} {'now':>10} {'difference':>11} {'times as fast':>14}"]
    for path, before, after in difference(old, new):
        name = "  " * (len(path) - 1) + path[-1]
        cells = ["-" if cell is None else cell for cell in _cells(before, after)]
        lines.append("{:28} {:>10} {:>10} {:>11} {:>14}".format(name, *cells))
    return "\n".join(lines)


def _cells(before: int | None, after: int | None) -> tuple[str | None, ...]:
    first = None if before is None else f"{before / 1e6:.3f}"
    second = None if after is None else f"{after / 1e6:.3f}"
    if before is None or after is None:
        return first, second, None, None
    return (
        first,
        second,
        f"{(after - before) / 1e6:+.3f}",
        f"{before / after:.2f}" if after else None,
    )


def _step(summary: Summary) -> list[Row]:
    return [row for row in summary.rows if row.path == ("step",)]


def _ms(nanoseconds: int, summary: Summary) -> str:
    return f"{nanoseconds / max(summary.steps, 1) / 1e6:.3f}"

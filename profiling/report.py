"""One page about everything that was measured into a folder:

    python -m profiling.report DIR

Reads results.csv (`profiling.speed`, `profiling.kernel_speed`), roofs.json, steps.json
(`profiling.suite`), plans.json (a copy of the chosen plans, else this user's and the shipped ones),
profile.png (`profiling.nsys`) and the committed results; writes report.html and summary.md.
"""

import os
import sys
from pathlib import Path

from kernels.choices import Choice
from kernels.store import Store, cache_dir, user_store
from profiling import rows
from profiling.pictures import draw_history
from profiling.report_networks import add_memory, add_networks, ratio_cell
from profiling.report_rooms import add_rooms
from profiling.suite import Outcome, read_outcomes
from profiling.verdict import VERBS, Job, jobs_of, number, standings, verdict
from train.arguments import Parser
from train.document import Document
from train.errors import DataError, LapisError
from train.record import read_json

RESULTS = rows.ROOT / "profiling" / "results"


def write(folder: Path) -> None:
    """Write report.html, summary.md and their pictures into `folder`.

    Raises DataError when nothing was measured into it, DiskError when it cannot be written.
    """
    measured = rows.read(folder / "results.csv")
    if not measured:
        raise DataError(
            f"{folder / 'results.csv'} holds no results: run "
            f"`python -m profiling.speed --out {folder}` first"
        )
    devices = list(dict.fromkeys(row["device"] for row in measured))
    document = Document(folder, "Measured speed", f"{' and '.join(devices)}", "summary.md")
    found = standings(measured)
    document.note(*verdict(found))
    jobs = jobs_of(measured)
    if jobs:
        add_networks(document, jobs, found)
        add_memory(document, jobs)
    roofs = folder / "roofs.json"
    add_rooms(document, measured, read_json(roofs) if roofs.exists() else {}, _wrong_rooms(folder))
    _others(document, measured)
    _plans(document, _choices(folder, devices))
    if (folder / "profile.png").exists():
        document.section("Timeline")
        document.figure(
            "profile.png",
            (folder / "profile.png").read_bytes(),
            "One step, as the profiler saw it.",
            "Timeline of a training step",
        )
    _history(document, folder, measured)
    _origin(document, folder, measured)
    document.write()


def _others(document: Document, measured: list[rows.Row]) -> None:
    """What other commands wrote in the same schema: neither a network's step nor a room."""
    found = [row for row in measured if row["image_size"] and row["mode"] not in VERBS]
    if not found:
        return
    document.section("Other measurements")
    document.table(
        ("what", "mode", "px", "provider", "images/s", "times the baseline", "numbers"),
        [
            (row["model"], row["mode"], row["image_size"], row["provider"],
             number(row["images_per_second"]), ratio_cell(row), row["numerics"])
            for row in found
        ],
    )  # fmt: skip


def _wrong_rooms(folder: Path) -> set[str]:
    """Rooms whose numerics step in the suite did not end well: no speed-up is told of them."""
    numerics = read_outcomes(folder).get("numerics")
    ended = numerics.detail if numerics else {}
    return {name for name, line in ended.items() if line.startswith(("exit", "out of time"))}


def _choices(folder: Path, devices: list[str]) -> list[Choice]:
    """The plans chosen on these devices: those copied into the folder, else all that are known."""
    if (folder / "plans.json").exists():
        return list(Store(folder).read().values())
    store = user_store(cache_dir())
    everywhere = [*store.read().values(), *(c for table in store.shipped.values() for c in table)]
    return [choice for choice in everywhere if choice.key.gpu in devices]


def _plans(document: Document, choices: list[Choice]) -> None:
    if not choices:
        return
    document.section("Plans of the blocks")
    names = list(dict.fromkeys(name for choice in choices for name in choice.rivals))
    document.table(
        ("block", "type", "chosen", *(f"{name}, us" for name in names), "why"),
        [
            (choice.key.what, choice.key.dtype, choice.winner,
             *(_rival(choice, name) for name in names), choice.reason)
            for choice in choices
        ],
        "Forward and backward of one block in a CUDA graph: median and quartiles. A rival is"
        " refused when its numbers are wrong; `python -m kernels.select --show` says why.",
    )  # fmt: skip


def _rival(choice: Choice, name: str) -> str:
    rival = choice.rivals.get(name)
    if rival is None or rival.median_us is None:
        return "refused" if rival and rival.refused else ""
    return f"{rival.median_us:.1f} ({rival.low_us:.1f} to {rival.high_us:.1f})"


def _history(document: Document, folder: Path, measured: list[rows.Row]) -> None:
    """Our best time of every job by commit, from the committed results and this folder."""
    committed = [
        row
        for path in sorted(RESULTS.glob("*/results.csv"))
        if path.parent.resolve() != folder.resolve()
        for row in rows.read(path)
    ]
    best: dict[Job, dict[str, rows.Row]] = {}
    for commit in dict.fromkeys(row["commit"] for row in (*committed, *measured)):
        of_commit = [row for row in (*committed, *measured) if row["commit"] == commit]
        for one in filter(None, standings(of_commit)):
            best.setdefault(one.job, {})[commit] = one.ours
    if not best:
        return
    document.section("History")
    lines = [
        (f"{job[1]}, {job[2]}, batch {job[3]}, {job[0]}", [_point(row) for row in found.values()])
        for job, found in best.items()
        if len(found) > 1
    ]
    if lines:
        document.figure(
            "history.png", draw_history(lines),
            "The best of our providers at each commit that was measured, with quartiles.",
            "Our time an image by commit; the table below holds the numbers.",
        )  # fmt: skip
    document.table(
        ("date", "commit", "device", "job", "best of ours", "us/image", "images/s"),
        [
            (row["date"], row["commit"], row["device"], f"{row['model']}, {row['mode']}, batch "
             f"{row['batch']}", row["provider"], number(row["us_per_image"]),
             number(row["images_per_second"]))
            for found in best.values() for row in found.values()
        ],
    )  # fmt: skip


def _point(row: rows.Row) -> tuple[str, float, float, float]:
    commit = row["commit"].removeprefix("source+")[:12]
    return commit, *(float(row[name]) for name in ("us_per_image", "low", "high"))


def _origin(document: Document, folder: Path, measured: list[rows.Row]) -> None:
    document.section("Versions, and how to measure again")
    names = ("device", "torch", "triton", "cudnn", "driver", "commit", "date")
    document.facts(
        {name: ", ".join(dict.fromkeys(row[name] for row in measured)) for name in names}
    )
    path = folder / rows.COMMANDS
    if path.exists():
        document.command(path.read_text().strip())
    steps = read_outcomes(folder)
    if steps:
        document.table(
            ("step of the suite", "status", "seconds", "numerics of the rooms"),
            [
                (name, step.status, f"{step.seconds:g}", _numerics(name, step))
                for name, step in steps.items()
            ],
        )


def _numerics(name: str, step: Outcome) -> str:
    if name != "numerics":
        return ""
    return "; ".join(f"{room}: {line}" for room, line in step.detail.items())


def main(argv: list[str] | None = None) -> int:
    parser = Parser("profiling.report", __doc__)
    parser.add_argument("folder", type=Path, help="where the results lie")
    folder = parser.parse_args(argv).folder
    try:
        write(folder)
    except LapisError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"report: {os.path.relpath(folder / 'report.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

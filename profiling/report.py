"""One page about everything that was measured into a folder:

    python -m profiling.report DIR

Reads results.csv (`profiling.speed`, `profiling.kernel_speed`), roofs.json, steps.json
(`profiling.suite`), plans.json (a copy of the chosen plans, else this user's and the shipped ones),
profile.png (`profiling.nsys`) and the committed results; writes report.html and summary.md.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kernels.choices import Choice
from kernels.store import Store, cache_dir, user_store
from profiling import agree, rows
from profiling.document import Document
from profiling.pictures import BASE, FALSE, OURS, RIVAL, Bar, draw_bars, draw_history, draw_roofline
from profiling.providers import PROVIDERS
from profiling.roofline import Roofs
from profiling.verdict import Job, Standing, interval, is_ours, jobs_of, standings, verdict
from train.errors import DataError, LapisError

RESULTS = rows.ROOT / "profiling" / "results"
ORDER = {provider.__name__: place for place, provider in enumerate(PROVIDERS)}


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
    document = Document(folder, "Measured speed", f"{' and '.join(devices)}")
    found = standings(measured)
    document.note(*verdict(found))
    jobs = jobs_of(measured)
    if jobs:
        _networks(document, jobs, found)
        _memory(document, jobs)
    _rooms(document, measured, _json(folder / "roofs.json"), _wrong_rooms(folder))
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


def _networks(
    document: Document, jobs: dict[Job, list[rows.Row]], found: Sequence[Standing | None]
) -> None:
    document.section("Whole networks")
    document.table(
        ("job", "best of ours", "images/s", "times the baseline", "best rival", "times the rival"),
        [_standing_cells(one, jobs) for one in found if one is not None],
        "With 95 % intervals: to the baseline from paired turns, to the rival from both medians.",
    )
    timed = {job: [row for row in found if row["us_per_image"]] for job, found in jobs.items()}
    groups = [(_title(job, jobs), [_time_bar(r) for r in _sorted(f)]) for job, f in timed.items()]
    document.figure(
        "networks.png",
        draw_bars([group for group in groups if group[1]], "us an image"),
        "Median time an image with quartiles, shorter is better; beside it the ratio to the"
        " baseline with its 95 % interval. A pale bar computes something else and has no ratio.",
        "Bars of the time an image of every provider; the tables below hold the numbers.",
    )
    for job, of_job in jobs.items():
        samples = sorted({row["n"] for row in of_job if row["n"]}, key=int)
        document.table(
            (_title(job, jobs), "us/image", "quartiles", "images/s", "times the baseline",
             "peak GB", "first step, s", "J/image", "numbers"),
            [_network_cells(row) for row in _sorted(of_job)],
            f"Baseline {_baselines(of_job)}; {', '.join(samples)} samples each. The interval is a"
            " 95 % bootstrap of the median of paired ratios. Numbers are right when their error"
            " against float32 is at most twice that of eager bfloat16.",
        )  # fmt: skip


def _standing_cells(one: Standing, jobs: dict[Job, list[rows.Row]]) -> tuple[str, ...]:
    rate = _number(one.ours["images_per_second"])
    cells = (_title(one.job, jobs), one.ours["provider"], rate, _ratio(one.ours))
    if one.rival is None:
        return (*cells, "", "")
    return (*cells, one.rival["provider"], f"{interval(one.ratio, one.low, one.high)}x")


def _sorted(found: Sequence[rows.Row]) -> list[rows.Row]:
    return sorted(found, key=lambda row: ORDER.get(row["provider"], len(ORDER)))


def _title(job: Job, jobs: dict[Job, list[rows.Row]]) -> str:
    device, model, mode, batch, size = job
    several = len({one[0] for one in jobs}) > 1
    return f"{model}, {mode}, batch {batch}, {size} px" + (f", {device}" if several else "")


def _baselines(found: Sequence[rows.Row]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(r["baseline"] for r in found) if name)


def _color(row: rows.Row) -> str:
    if row["numerics"] != agree.OK:
        return FALSE
    if row["provider"] == row["baseline"]:
        return BASE
    return OURS if is_ours(row["provider"]) else RIVAL


def _time_bar(row: rows.Row) -> Bar:
    us, low, high = (float(row[name]) for name in ("us_per_image", "low", "high"))
    return Bar(row["provider"], us, low, high, f"{us:,.4g}  {_ratio(row)}", _color(row))


def _ratio(row: rows.Row) -> str:
    if row["speedup"]:
        return f"{interval(row['speedup'], row['speedup_low'], row['speedup_high'])}x"
    if row["numerics"] != agree.OK:
        return "wrong numbers" if row["us_per_image"] else ""
    return "baseline" if row["provider"] == row["baseline"] else ""


def _network_cells(row: rows.Row) -> tuple[str, ...]:
    if not row["us_per_image"]:
        return (row["provider"], *[""] * 7, row["numerics"])
    return (
        row["provider"],
        _number(row["us_per_image"]),
        f"{_number(row['low'])} to {_number(row['high'])}",
        _number(row["images_per_second"]),
        _ratio(row),
        _number(row["peak_memory_gb"]),
        _number(row["first_step_s"]),
        _number(row["joules_per_image"]),
        row["numerics"],
    )


def _memory(document: Document, jobs: dict[Job, list[rows.Row]]) -> None:
    groups = [
        (_title(job, jobs), [_memory_bar(row) for row in _sorted(found) if row["peak_memory_gb"]])
        for job, found in jobs.items()
    ]
    if groups := [group for group in groups if group[1]]:
        document.section("Memory")
        document.figure(
            "memory.png",
            draw_bars(groups, "GB at the peak"),
            "Memory at the peak of a step, weights and optimizer included: what the allocator gave"
            " on a GPU; on a CPU what is kept, and the resident pages that a step adds.",
            "Bars of the peak memory of every provider; the tables above hold the numbers.",
        )


def _memory_bar(row: rows.Row) -> Bar:
    gb = float(row["peak_memory_gb"])
    return Bar(row["provider"], gb, gb, gb, f"{gb:.2f}", _color(row))


def _rooms(document: Document, measured: list[rows.Row], roofs: dict, wrong: set[str]) -> None:
    rooms = [row for row in measured if not row["image_size"]]
    if not rooms:
        return
    document.section("Rooms under their roofs")
    if roofs:
        known = Roofs(**roofs)
        document.facts(
            {
                "Copy": f"{known.copy_gb_s:,.0f} GB/s",
                "Copy in cache": f"{known.l2_gb_s:,.0f} GB/s",
                "bf16 matrix product": f"{known.matmul_tflop_s:,.3g} TFLOP/s",
                "Launch": f"{known.launch_us:.2f} us",
                "Launch in a graph": f"{known.graph_launch_us:.2f} us",
            }
        )
        if picture := draw_roofline(rooms, known):
            document.figure(
                "roofline.png",
                picture,
                "Each mark is one shape and direction. The roofs were measured on this device. A"
                " mark above the memory roof read its inputs from cache.",
                "Roofline: TFLOP/s over FLOPs a byte; the table below holds the numbers.",
            )
    document.table(
        ("room", "shape", "pass", "provider", "us", "GB/s", "TFLOP/s", "of the roof",
         "times eager", "numbers"),
        [_room_cells(row, wrong) for row in rooms],
        "Of the roof: the time below which no kernel can go that moves every tensor once, over the"
        " time it took. `cudnn` and `onednn` are the library's plain convolutions.",
    )  # fmt: skip


def _room_cells(row: rows.Row, wrong: set[str]) -> tuple[str, ...]:
    place = (row["model"], row["shape"], row["mode"], row["provider"])
    if not row["us_per_image"]:
        return (*place, "", "", "", "", "", row["numerics"])
    us = float(row["us_per_image"]) * int(row["batch"])
    share = f"{100 * float(row['floor_share']):.3g} %"
    numbers = (_number(us), _number(row["gb_per_s"]), _number(row["tflop_per_s"]), share)
    bad = row["model"] in wrong
    ratio = "" if bad or not row["speedup"] else _ratio(row)
    return (*place, *numbers, ratio, "its tests did not pass" if bad else row["numerics"])


def _wrong_rooms(folder: Path) -> set[str]:
    """Rooms whose numerics step in the suite did not end well: no speed-up is told of them."""
    ended = _json(folder / "steps.json").get("numerics", {}).get("detail", {})
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
    for row in (*committed, *measured):
        right = row["image_size"] and row["us_per_image"] and row["numerics"] == agree.OK
        if not right or not is_ours(row["provider"]):
            continue
        job = tuple(row[name] for name in ("device", "model", "mode", "batch", "image_size"))
        of_job = best.setdefault(job, {})
        before = of_job.get(row["commit"])
        if before is None or float(row["us_per_image"]) < float(before["us_per_image"]):
            of_job[row["commit"]] = row
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
             f"{row['batch']}", row["provider"], _number(row["us_per_image"]),
             _number(row["images_per_second"]))
            for found in best.values() for row in found.values()
        ],
    )  # fmt: skip


def _point(row: rows.Row) -> tuple[str, float, float, float]:
    commit = row["commit"].removeprefix("source+")[:12]
    return commit, *(float(row[name]) for name in ("us_per_image", "low", "high"))


def _origin(document: Document, folder: Path, measured: list[rows.Row]) -> None:
    document.section("Versions and commands")
    names = ("device", "torch", "triton", "cudnn", "driver", "commit", "date")
    document.facts(
        {name: ", ".join(dict.fromkeys(row[name] for row in measured)) for name in names}
    )
    path = folder / rows.COMMANDS
    if path.exists():
        document.command(path.read_text().strip())
    steps = _json(folder / "steps.json")
    if steps:
        document.table(
            ("step of the suite", "status", "seconds", "numerics of the rooms"),
            [
                (name, step["status"], f"{step['seconds']:g}", _numerics(name, step))
                for name, step in steps.items()
            ],
        )


def _numerics(name: str, step: dict) -> str:
    if name != "numerics":
        return ""
    return "; ".join(f"{room}: {line}" for room, line in step["detail"].items())


def _number(value: object) -> str:
    """Four significant digits with thousands, or nothing."""
    if value == "":
        return ""
    number = float(value)
    digits = 0 if abs(number) >= 1000 else 3 - max(0, len(str(int(abs(number)))) - 1)
    return f"{number:,.{digits}f}" if abs(number) >= 0.1 else f"{number:.3g}"


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.report", description=__doc__)
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

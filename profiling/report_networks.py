"""The part of a speed report on whole networks: who is how fast, and with how much memory."""

from collections.abc import Sequence

from profiling import agree, rows
from profiling.pictures import BASE, FALSE, OURS, RIVAL, Bar, draw_bars
from profiling.providers import PROVIDERS
from profiling.verdict import Job, Standing, interval, is_ours, number
from train.document import Document

ORDER = {provider.__name__: place for place, provider in enumerate(PROVIDERS)}


def add_networks(
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
    if groups := [group for group in groups if group[1]]:  # a job may have run out of time
        document.figure(
            "networks.png",
            draw_bars(groups, "us an image"),
            "Median time an image with quartiles, shorter is better; beside it the ratio to the"
            " baseline with its 95 % interval. A pale bar computes something else and has no"
            " ratio.",
            "Bars of the time an image of every provider; the tables below hold the numbers.",
        )
    for job, of_job in jobs.items():
        samples = sorted({row["n"] for row in of_job if row["n"]}, key=int)
        energy = any(row["joules_per_image"] for row in of_job)
        heads = ("us/image", "quartiles", "images/s", "times the baseline", "peak GB",
                 "first step, s", *(["J/image"] if energy else []), "numbers")  # fmt: skip
        document.table(
            (_title(job, jobs), *heads),
            [_network_cells(row, energy) for row in _sorted(of_job)],
            f"Baseline {_baselines(of_job)}; {' or '.join(samples)} samples each.",
        )
    document.text(
        "The interval of a ratio to the baseline is a 95 % bootstrap of the median of the paired"
        " ratios. Numbers are right when their error against float32 is at most twice that of eager"
        " bfloat16. The first step includes building and compiling. Eager and compiled rows run"
        " torchvision's network where it has one of that name."
    )


def _standing_cells(one: Standing, jobs: dict[Job, list[rows.Row]]) -> tuple[str, ...]:
    rate = number(one.ours["images_per_second"])
    cells = (_title(one.job, jobs), one.ours["provider"], rate, ratio_cell(one.ours))
    if one.rival is None:
        return (*cells, "", "")
    return (*cells, one.rival["provider"], interval(one.ratio, one.low, one.high))


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
    return Bar(row["provider"], us, low, high, f"{us:,.4g}  {ratio_cell(row)}", _color(row))


def ratio_cell(row: rows.Row) -> str:
    """The ratio to the baseline with its interval, or why there is none."""
    if row["speedup"]:
        return interval(row["speedup"], row["speedup_low"], row["speedup_high"])
    if row["numerics"] != agree.OK:
        return "wrong numbers" if row["us_per_image"] else ""
    return "baseline" if row["provider"] == row["baseline"] else ""


def _network_cells(row: rows.Row, energy: bool) -> tuple[str, ...]:
    if not row["us_per_image"]:
        return (row["provider"], *[""] * (6 + energy), row["numerics"])
    return (
        row["provider"],
        number(row["us_per_image"]),
        f"{number(row['low'])}\u2060\u2013\u2060{number(row['high'])}",
        number(row["images_per_second"]),
        ratio_cell(row),
        number(row["peak_memory_gb"]),
        number(row["first_step_s"]),
        *([number(row["joules_per_image"])] if energy else []),
        row["numerics"],
    )


def add_memory(document: Document, jobs: dict[Job, list[rows.Row]]) -> None:
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

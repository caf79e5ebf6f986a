"""The part of a speed report on single rooms and the library's convolutions, under the roofs."""

from profiling import agree, rows
from profiling.pictures import draw_roofline
from profiling.roofline import Roofs
from profiling.verdict import interval, number
from train.document import Document

TIMED = {"reference": "eager", "compile": "compiled", "fused": "ours"}
Place = tuple[str, str, str, str]  # room, shape, dtype, pass


def add_rooms(
    document: Document, measured: list[rows.Row], roofs: dict | None, wrong: set[str]
) -> None:
    """Add roofline and tables; no speed-up is told of a room in `wrong`."""
    rooms = [row for row in measured if not row["image_size"] and row["shape"]]
    if not rooms:
        return
    document.section("Rooms under their roofs")
    if roofs:
        _add_roofline(document, rooms, Roofs(**roofs))
    library = [row for row in rooms if row["model"].startswith("conv ")]
    found: dict[Place, dict[str, rows.Row]] = {}
    for row in rooms:
        if row not in library:
            place = (row["model"], row["shape"], row["dtype"], row["mode"])
            found.setdefault(place, {})[row["provider"]] = row
    order = list(dict.fromkeys(room for room, *_ in found))
    found = dict(sorted(found.items(), key=lambda item: order.index(item[0][0])))
    names = [one for one in TIMED if any(one in by_name for by_name in found.values())]
    if found:
        document.table(
            ("room", "shape", "pass", *(f"{TIMED[name]}, us" for name in names),
             *(f"{TIMED[name]} times eager" for name in names[1:]), "numbers"),
            [_cells(place, by_name, names, wrong) for place, by_name in found.items()],
            "In brackets the share of the roof: the time below which no kernel can go that moves"
            " every tensor once, over the time it took; above 100 % something was read from cache."
            " Ratios with 95 % intervals.",
        )  # fmt: skip
    if library:
        document.table(
            ("site", "shape", "pass", "library", "us", "GB/s", "TFLOP/s", "of the roof"),
            [_library_cells(row) for row in library],
            "The library's plain convolutions: what ours compete with.",
        )


def _add_roofline(document: Document, rooms: list[rows.Row], roofs: Roofs) -> None:
    document.facts(
        {
            "Copy": f"{roofs.copy_gb_s:,.0f} GB/s",
            "Copy in cache": f"{roofs.l2_gb_s:,.0f} GB/s",
            "bf16 matrix product": f"{roofs.matmul_tflop_s:,.3g} TFLOP/s",
            "Launch": f"{roofs.launch_us:.2f} us",
            "Launch in a graph": f"{roofs.graph_launch_us:.2f} us",
        }
    )
    if picture := draw_roofline(rooms, roofs):
        document.figure(
            "roofline.png",
            picture,
            "Each mark is one shape and direction. The roofs were measured on this device. A mark"
            " above the memory roof read its inputs from cache.",
            "Roofline: TFLOP/s over FLOPs a byte; the tables below hold the times.",
        )


def _cells(
    place: Place, by_name: dict[str, rows.Row], names: list[str], wrong: set[str]
) -> tuple[str, ...]:
    room, shape, dtype, mode = place
    bad = room in wrong
    times = [_time(by_name.get(name)) for name in names]
    ratios = ["" if bad else _ratio(by_name.get(name)) for name in names[1:]]
    verdicts = [f"{TIMED[n]} {by_name[n]['numerics']}" for n in names if n in by_name]
    failed = [one for one in verdicts if not one.endswith(f" {agree.OK}")]
    numbers = "its tests did not pass" if bad else "; ".join(failed) or agree.OK
    named = shape if dtype == "bfloat16" else f"{shape} {dtype}"
    return (room, named, mode, *times, *ratios, numbers)


def _time(row: rows.Row | None) -> str:
    if row is None or not row["us_per_image"]:
        return ""
    us = float(row["us_per_image"]) * int(row["batch"])
    return f"{number(us)}\u00a0({100 * float(row['floor_share']):.0f}\u00a0%)"


def _ratio(row: rows.Row | None) -> str:
    if row is None or not row["speedup"]:
        return ""
    return interval(row["speedup"], row["speedup_low"], row["speedup_high"])


def _library_cells(row: rows.Row) -> tuple[str, ...]:
    us = float(row["us_per_image"]) * int(row["batch"])
    numbers = (number(row["gb_per_s"]), number(row["tflop_per_s"]))
    share = f"{100 * float(row['floor_share']):.0f} %"
    site = row["model"].removeprefix("conv ")
    return (site, row["shape"], row["mode"], row["provider"], number(us), *numbers, share)

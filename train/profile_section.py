"""The section of a page on where a step's time goes, from `profile.json` and `profile.png`.

`profiling` writes both files into a folder; here they are only read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.errors import FOREIGN
from train.page import Page
from train.record import opened

INDENT = "\u00a0\u00a0\u00a0"  # a level of ranges within ranges
LONGEST = 40  # characters of a kernel's name
KINDS = {"GPU": "GPU time", "CPU": "operator time", "none": "host time"}


def add_profile(page: Page, folder: Path) -> None:
    """Add the section, if `folder` holds a profile; a damaged one is named on the page."""
    path = folder / "profile.json"
    if not path.exists():
        return
    page.section("Where a step's time goes")
    try:
        profile = opened(json.loads(path.read_bytes()))
        sentence, rows = verdict(profile), table_rows(profile)
        picture = path.with_suffix(".png").read_bytes()
    except FOREIGN as error:
        page.note("warn", f"The profile is damaged ({error}): profile the training again.")
        return
    page.note("info", sentence)
    page.figure(
        picture,
        "Above, the step of median length: what the host has open, and below it what ran. Then the"
        " layers, forward and backward, with their share of a step.",
        "Timeline of a training step, and the time of every layer; the table below holds the same.",
        plot=True,
    )
    kind, traced = KINDS[profile["device"]], profile["device"] != "none"
    header = ["range", "shape", f"{kind}, ms", "share"]
    caption = f"Means a step, over {profile['steps']} steps recorded by {profile['source']}."
    if traced:
        header += ["kernels", "gaps, ms", "host, ms", "longest"]
        caption += (
            " A kernel, on a CPU an operator, belongs to the range that launched it; gaps are time"
            " between its first and last kernel in which nothing ran; host is how long the range"
            " was open."
        )
    page.table(header, rows, caption)


def verdict(profile: Mapping[str, Any]) -> str:
    """One sentence: the largest phase, the largest layer, and the gaps."""
    rows, kind = profile["rows"], KINDS[profile["device"]]
    what = "host" if profile["device"] == "none" else "device"
    phases = [row for row in rows if len(row["path"]) == 2 and row["path"][0] == "step"]
    layers = [row for row in rows if len(row["path"]) == 3 and row["path"][0] == "step"]
    step = next((row for row in rows if row["path"] == ["step"]), None)
    if step is None or not step[what]:
        return "No whole step was recorded."
    sentence = f"A step takes {_ms(step[what], profile)} ms of {kind}"
    for found in (phases, layers):
        if found:
            most = max(found, key=lambda row: row[what])
            name = "'s ".join(reversed(most["path"][1:]))
            sentence += f", {name} {100 * most[what] / step[what]:.0f}\u00a0% of it"
    if what == "device":
        idle = step["gaps"] / (step["gaps"] + step["device"])
        sentence += f"; nothing runs for {100 * idle:.0f}\u00a0% of the time between kernels"
    return sentence + "."


def table_rows(profile: Mapping[str, Any]) -> list[list[object]]:
    """A row of cells for every range, indented by its depth."""
    found = []
    steps, traced = max(profile["steps"], 1), profile["device"] != "none"
    for row in profile["rows"]:
        indent = INDENT * (len(row["path"]) - 1)
        share = None if row["share"] is None else f"{100 * row['share']:.1f} %"
        cells = [indent + row["path"][-1], row["shape"]]
        if not traced:
            found.append([*cells, _ms(row["host"], profile), share])
            continue
        longest = row["top"][0][0] if row["top"] else ""
        longest = longest if len(longest) <= LONGEST else longest[: LONGEST - 1] + "\u2026"
        cells += [_ms(row["device"], profile), share, f"{row['kernels'] / steps:.4g}"]
        found.append([*cells, _ms(row["gaps"], profile), _ms(row["host"], profile), longest])
    return found


def _ms(nanoseconds: int, profile: Mapping[str, Any]) -> str:
    return f"{nanoseconds / max(profile['steps'], 1) / 1e6:.3f}"

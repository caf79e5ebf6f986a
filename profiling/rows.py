"""The one schema of every speed measurement: a CSV file that only grows, with a unique key.

A row is one provider measured on one job: median, quartiles and number of samples, and the ratio to
`baseline` with its 95 % interval where the numbers were right. A measurement repeated under the
same key (same machine, versions, source and day's code) replaces the older row, so a suite that is
resumed leaves no twins.
"""

import csv
import hashlib
import os
import shlex
import subprocess
import sys
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.timing import place

KEY = (
    "provider",
    "model",
    "mode",
    "batch",
    "image_size",
    "shape",
    "dtype",
    "device",
    "torch",
    "triton",
    "cudnn",
    "driver",
    "commit",
)
COLUMNS = (
    *KEY,
    "date",
    "baseline",
    "us_per_image",
    "low",
    "high",
    "n",
    "images_per_second",
    "speedup",
    "speedup_low",
    "speedup_high",
    "peak_memory_gb",
    "joules_per_image",
    "first_step_s",
    "gb_per_s",
    "tflop_per_s",
    "floor_share",
    "method",
    "numerics",
)
COMMANDS = "commands.txt"
ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a results file, every value a string; no file is no rows."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [dict.fromkeys(COLUMNS, "") | row for row in csv.DictReader(file)]


def append(path: Path, row: Row) -> None:
    """Add `row` to `path`, in place of one with the same key; a reader never sees half a file.

    Raises ValueError for a column that the schema does not know.
    """
    unknown = set(row) - set(COLUMNS)
    if unknown:
        raise ValueError(f"{path}: columns {sorted(unknown)} are not in the schema")
    new = {column: _text(row.get(column, "")) for column in COLUMNS}
    rows = [old for old in read(path) if any(old[name] != new[name] for name in KEY)]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*rows, new])
    os.replace(partial, path)


def note_command(folder: Path, module: str, argv: list[str] | None) -> None:
    """Remember in `folder` how its rows were measured."""
    line = shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])
    path = folder / COMMANDS
    known = path.read_text().splitlines() if path.exists() else []
    if line not in known:
        path.write_text("\n".join([*known, line]) + "\n")


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def environment(device: torch.device) -> Row:
    """The columns that say where and with what a row was measured."""
    return {**place(device), "commit": commit(), "date": date.today().isoformat()}


@cache
def commit() -> str:
    """The checkout's commit, with a hash of the measured sources when they differ from it or when
    there is no git."""
    head = _output("git", "rev-parse", "--short", "HEAD")
    measured = ("kernels", "models")
    if head and not _output("git", "status", "--porcelain", *measured):
        return head
    digest = hashlib.sha256()
    for path in sorted(path for folder in measured for path in (ROOT / folder).glob("**/*.py")):
        digest.update(path.read_bytes())
    return f"{head or 'source'}+{digest.hexdigest()[:8]}"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

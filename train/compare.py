"""Runs side by side: `python -m train.compare RUN RUN...`.

Prints what the folders of the runs say, the settings in which they differ, and, where their splits
are the same, what each run's best weights know more or less than the first's, photo by photo. The
page adds curves and the recall of each class.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from train.arguments import Parser
from train.command import run_command
from train.compare_page import write_page
from train.comparison import Run, figures, findings, pairs, read_runs, settings
from train.files import unwritable


def main(argv: Sequence[str] | None = None) -> int:
    """Compare as the flags say; returns the exit code."""
    parser = Parser("train.compare", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/comparison"),
        help="folder of comparison.html (default: %(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    return run_command(
        lambda: compare(arguments.runs, arguments.out),
        debug=arguments.debug,
        interrupted="interrupted; nothing was written",
    )


def compare(folders: Sequence[Path], out: Path) -> None:
    """Compare the runs in `folders`, print it, and write the page into `out`. Raises UsageError,
    CheckpointError and DiskError."""
    runs = read_runs(folders)
    print(text(runs))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error
    write_page(runs, out)
    print(f"page: {out / 'comparison.html'}", file=sys.stderr)


def text(runs: Sequence[Run]) -> str:
    """The comparison as lines of text."""
    every = [figures(run) for run in runs]
    rows = [("", *(run.name for run in runs))]
    rows += [(name, *(one[name] for one in every)) for name in every[0]]
    parts = [("different settings", settings(runs)), ("doctor", findings(runs))]
    for title, part in parts:
        if part:
            rows += [("",) * len(rows[0]), (f"{title}:", *[""] * len(runs))]
            rows += [(f"  {name}", *values) for name, values in part]
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    sentences = [pair.sentence()[1].replace("\u00a0", " ") for pair in pairs(runs)]
    return "\n".join([*lines, "", *sentences])


def _cell(value: object) -> str:
    return "-" if value is None else str(value).replace("\u00a0", " ")


if __name__ == "__main__":
    sys.exit(main())

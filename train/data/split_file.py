"""A split written down: a CSV of filename,label,split, such as the split.csv of a run."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from train.data.photos import Photos
from train.data.table import read_rows
from train.errors import DataError

COLUMNS = ("filename", "label", "split")
SIDES = ("train", "val")


def split_csv(rows: Iterable[tuple[str, str, str]]) -> bytes:
    """The file that `read_split` reads back, of the rows of a `Split`."""
    rows = list(rows)
    text = io.StringIO(newline="")
    spaced = any(cell != cell.strip() for row in rows for cell in row)  # kept only within quotes
    writer = csv.writer(text, quoting=csv.QUOTE_ALL if spaced else csv.QUOTE_MINIMAL)
    writer.writerows([COLUMNS, *rows])
    return text.getvalue().encode()


def read_split(
    table: Path, photos: Photos, left_out: Iterable[str] = (), *, other_classes: bool = False
) -> tuple[str, ...]:
    """The side of each photo, "train" or "val", as `table` gives it.

    Rows of photos that are not trained on count for nothing: those of the files `left_out`, and
    with `other_classes` those of labels that are not among the classes.
    Raises DataError, with the row where there is one, unless every photo has one row, under the
    label it has in the data.
    """
    position = {file: i for i, file in enumerate(photos.files)}
    unused = set(left_out)
    sides = [""] * len(photos)
    found: dict[str, int] = {}
    for row, cells in read_rows(table, COLUMNS):
        where = f"row {row} of {table}"
        file, label = cells["filename"], cells["label"]
        if file not in position:  # as people write it
            file = file.strip().replace("\\", "/").removeprefix("./")
        if label not in photos.classes:
            label = label.strip()
        side = side_of(cells["split"], where)
        if file in found:
            raise DataError(f"{where} names {file} again, after row {found[file]}: delete one.")
        found[file] = row
        if file not in position:
            if file in unused or (other_classes and label not in photos.classes):
                continue
            raise DataError(f"{where} names {file!r}, which is not in the data: delete the row.")
        own = photos.classes[photos.labels[position[file]]]
        if label != own:
            raise DataError(
                f"{where} labels {file} {label!r}, the data says {own!r}: the data's labels count, "
                "correct the row."
            )
        sides[position[file]] = side
    if "" in sides:
        raise DataError(
            f"{table} has no row for {sides.count('')} of the {len(photos)} photos (first: "
            f"{photos.files[sides.index('')]}): add them, or take the photos it was made for."
        )
    return tuple(sides)


def side_of(cell: str, where: str) -> str:
    """A cell of the column split as "train" or "val". Raises DataError for anything else."""
    side = cell.strip().lower()
    if side not in SIDES:
        raise DataError(f"{where} has the split {cell.strip()!r}: write train or val.")
    return side

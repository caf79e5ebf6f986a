"""A folder with `train.csv` (columns filename, label[, split]) and the photos in `train/`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from train.data.photos import Excluded, Photos, choose_classes, list_photos, photo_files
from train.data.split_file import side_of
from train.data.table import misfit, read_rows
from train.errors import DataError


def accepts(data: str) -> bool:
    return (Path(data) / "train.csv").is_file()


def open_source(data: str, *, classes: tuple[str, ...] = (), seed: int = 0) -> Photos:
    """Raises DataError with the row for a table that cannot be trusted, else lists and counts."""
    folder = Path(data)
    root = folder / "train"
    if not root.is_dir():
        raise DataError(f"{folder} has train.csv but no folder train/: put the photos there.")
    table = folder / "train.csv"
    listed: dict[str, tuple[str, int]] = {}
    sides: dict[str, str] = {}
    excluded = []
    for row, file, label, side in read_table(table):
        if side is not None and sides.setdefault(file, side) != side:
            raise DataError(f"row {row} of {table} gives {file} a second side, {side}: keep one.")
        if file not in listed:
            listed[file] = (label, row)
        elif listed[file][0] == label:
            excluded.append(Excluded(file, f"listed again in row {row}", bad=False))
        else:
            raise DataError(
                f"{table} gives {file} two labels, {listed[file][0]} in row {listed[file][1]} and "
                f"{label} in row {row}: keep one."
            )
    if not listed:
        raise DataError(f"{table} lists no photos: give it rows of filename,label.")
    chosen = choose_classes((label for label, _ in listed.values()), classes, str(table))
    photos, junk = photo_files(root)
    unlisted = [Excluded(f, "no row in train.csv", bad=False) for f in photos if f not in listed]
    entries = [
        (file, label, f"row {row} of {table}")
        for file, (label, row) in listed.items()
        if label in chosen
    ]
    found = list_photos(folder.name, root, entries, chosen, [*excluded, *junk, *unlisted])
    return replace(found, sides=tuple(sides[file] for file in found.files) if sides else None)


def read_table(table: Path) -> Iterator[tuple[int, str, str, str | None]]:
    """(row, file, label, side) of each row that is not blank; the row counts lines from 1.

    side: "train" or "val" from the column split, None in a table without. Stray spaces do not
    matter. Raises DataError with the row.
    """
    for row, cells in read_rows(table, ("filename", "label")):
        where = f"row {row} of {table}"
        file, label = cells["filename"].strip(), cells["label"].strip()
        if "\n" in file + label:
            raise misfit(where, len(cells))
        if not file or not label:
            missing = "label" if file else "filename"
            raise DataError(f"{where} has no {missing}: fill it in or delete the row.")
        side = side_of(cells["split"], where) if "split" in cells else None
        yield row, _relative(file, where), label, side


def _relative(file: str, where: str) -> str:
    """`file` with forward slashes and without `.`; raises DataError if it leaves the folder."""
    path = PurePosixPath(file.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(file).drive or ".." in path.parts:
        raise DataError(f"{where} names {file!r}, outside train/: use names relative to train/.")
    return str(path)

"""A folder with `train.csv` (columns filename, label) and the photos in `train/`."""

import csv
import io
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from train.data.photos import Excluded, Photos, choose_classes, list_photos, photo_files
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
    excluded = []
    for row, file, label in read_table(table):
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
    return list_photos(folder.name, root, entries, chosen, [*excluded, *junk, *unlisted])


def read_table(table: Path) -> Iterator[tuple[int, str, str]]:
    """(row, file, label) of each row that is not blank; the row counts lines from 1.

    Comma, semicolon or tab; a byte order mark, CRLF and stray spaces do not matter.
    Raises DataError with the row.
    """
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{table} is not UTF-8 text (byte {error.start}): save it as UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"{table} cannot be read ({error.strerror}).") from None
    if "\0" in text:
        raise DataError(f"{table} holds NUL characters: save it as UTF-8 text.")
    header = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    columns: list[str] = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if not columns:
                columns = [cell.lower() for cell in cells]
                at_file, at_label = _columns(table, columns)
                continue
            where = f"row {reader.line_num} of {table}"
            if any(cells[len(columns) :]) or "\n" in "".join(cells):
                raise DataError(
                    f"{where} does not fit the {len(columns)} columns: put quotes around values "
                    "with a comma, and close every quote."
                )
            file, label = (cells[at] if at < len(cells) else "" for at in (at_file, at_label))
            if not file or not label:
                missing = "label" if file else "filename"
                raise DataError(f"{where} has no {missing}: fill it in or delete the row.")
            yield reader.line_num, _relative(file, where), label
    except csv.Error as error:
        raise DataError(f"row {reader.line_num} of {table} is not CSV ({error}).") from None


def _columns(table: Path, columns: list[str]) -> tuple[int, int]:
    for column in ("filename", "label"):
        if columns.count(column) != 1:
            raise DataError(
                f"{table} needs one column {column} in its first row, which reads "
                f"{', '.join(columns)}: name the columns filename,label."
            )
    if "split" in columns:
        warnings.warn(f"{table} has a column split, which is not used here.", stacklevel=2)
    return columns.index("filename"), columns.index("label")


def _relative(file: str, where: str) -> str:
    """`file` with forward slashes and without `.`; raises DataError if it leaves the folder."""
    path = PurePosixPath(file.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(file).drive or ".." in path.parts:
        raise DataError(f"{where} names {file!r}, outside train/: use names relative to train/.")
    return str(path)

"""Rows of a CSV file as people save it: comma, semicolon or tab, byte order mark, CRLF."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.errors import DataError


def read_rows(table: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(row, its cells by column) of each row that is not blank; the row counts lines from 1.

    Columns are named by the first row, in lower case here; a cell that is not there is empty.
    Stray spaces stay, but for those before a cell. Raises DataError with the row, and for a table
    without one column of each name in `needed`.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
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
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    columns: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = [cell.strip().lower() for cell in cells]
                _check(table, columns, needed)
                continue
            if any(cell.strip() for cell in cells[len(columns) :]):
                raise misfit(f"row {reader.line_num} of {table}", len(columns))
            cells += [""] * (len(columns) - len(cells))
            yield reader.line_num, dict(zip(columns, cells, strict=False))
    except csv.Error as error:
        raise DataError(f"row {reader.line_num} of {table} is not CSV ({error}).") from None


def misfit(where: str, columns: int) -> DataError:
    """The sentence for a row in which a comma or a quote stands where it should not."""
    return DataError(
        f"{where} does not fit the {columns} columns: put quotes around values with a comma, and "
        "close every quote."
    )


def _check(table: Path, columns: list[str], needed: Sequence[str]) -> None:
    for column in needed:
        if columns.count(column) != 1:
            raise DataError(
                f"{table} needs one column {column} in its first row, which reads "
                f"{', '.join(columns)}: name the columns {','.join(needed)}."
            )

"""Corrected labels: a reviewed CSV of filename,label in place of what the source says."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from train.data.photos import Excluded, Photos, choose_classes
from train.data.table import read_rows
from train.errors import DataError

COLUMNS = ("filename", "label")


@dataclass(frozen=True)
class Relabelled:
    """How many photos a table gave another label, and how many it dropped."""

    table: Path
    changed: int
    dropped: int


def relabel(photos: Photos, table: Path) -> tuple[Photos, Relabelled]:
    """`photos` as the rows of `table` correct them: another label, or none, which drops the photo.

    A row that repeats the photo's own label changes nothing. Files the source left out already may
    be dropped. Raises DataError, with the row, for a file that is not in the data, a class it does
    not have, or a file with two rows that disagree.
    """
    position = {file: i for i, file in enumerate(photos.files)}
    left_out = {item.file for item in photos.excluded}
    number = {label: k for k, label in enumerate(photos.classes)}
    known = ", ".join(photos.classes[:12]) + (", ..." if len(photos.classes) > 12 else "")
    labels, dropped = photos.labels.copy(), []
    seen: dict[str, tuple[int, str]] = {}
    for row, cells in read_rows(table, COLUMNS):
        where = f"row {row} of {table}"
        file, label = cells["filename"], cells["label"]
        if file not in position:  # as people write it
            file = file.strip().replace("\\", "/").removeprefix("./")
        if label not in number:
            label = label.strip()
        if not file:
            raise DataError(f"{where} has no filename: fill it in or delete the row.")
        if seen.setdefault(file, (row, label))[1] != label:
            raise DataError(
                f"{where} labels {file} {label!r}, row {seen[file][0]} labels it "
                f"{seen[file][1]!r}: keep one."
            )
        if label and label not in number:
            raise DataError(
                f"{where} gives {file} the label {label!r}, which is no class of {photos.name}: "
                f"choose from {known}, or leave it empty to drop the photo."
            )
        if seen[file][0] != row:
            continue
        if file not in position:
            if file in left_out and not label:
                continue
            raise DataError(
                f"{where} names {file!r}, which is not in {photos.name}: correct the name or "
                "delete the row."
            )
        i = position[file]
        if label:
            labels[i] = number[label]
        else:
            dropped.append(Excluded(file, f"dropped in row {row} of {table}", bad=False))
    gone = {item.file for item in dropped}
    kept = np.array([i for i, file in enumerate(photos.files) if file not in gone], np.int64)
    changed = int((labels != photos.labels).sum())
    corrected = replace(photos, labels=labels, excluded=(*photos.excluded, *dropped)).subset(kept)
    return corrected, Relabelled(table, changed, len(dropped))


def only_classes(photos: Photos, classes: tuple[str, ...]) -> Photos:
    """The photos of `classes`, all of them for (). Raises UsageError for one `photos` lacks."""
    chosen = choose_classes(photos.classes, classes, photos.name)
    number = {label: k for k, label in enumerate(chosen)}
    kept = [i for i, label in enumerate(photos.labels) if photos.classes[label] in number]
    part = photos.subset(kept)
    labels = [number[photos.classes[label]] for label in part.labels]
    return replace(part, classes=tuple(chosen), labels=np.array(labels, np.int64))

"""`check.html`: the findings, and thumbnails of every group so that they can be judged by eye."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from train.data.duplicates import in_order
from train.data.examine import Examined
from train.data.findings import Finding, counted
from train.data.photos import UnreadablePhoto
from train.data.suspects import Suspect
from train.page import Page, percent

MOST_GROUPS = 300  # of a kind on the page; check.json names them all
MOST_PHOTOS = 12  # of a group
CELL, COLUMNS = 200, 4  # pixels of a picture's longer side, pictures a row
SMALL_CELL, SMALL_COLUMNS, SHEET = 150, 5, 25
LETTERS = 18  # pixels; they must survive a phone's width
GREY = (128, 128, 128, 255)  # readable on light and dark

LEVELS = {"bad": "problem", "warn": "warning", "info": "note"}


def write_page(examined: Examined, found: Sequence[Finding], path: Path) -> None:
    """Write the page to `path`. Raises DiskError when that cannot be done."""
    photos = examined.photos
    page = Page("Photos checked", f"{photos.name}: {counted(len(photos), 'photo')}")
    problems = sum(finding.kind == "bad" for finding in found)
    warned = sum(finding.kind == "warn" for finding in found)
    if problems or warned:
        different = len(set(examined.pictures[examined.readable()].tolist()))
        page.note(
            "bad" if problems else "warn",
            f"{counted(problems, 'problem')}, {counted(warned, 'warning')}: {len(photos):,} photos "
            f"show {counted(different, 'different picture')}.",
        )
    else:
        page.note("good", "Nothing is wrong with these photos.")
    _overview(page, examined, found)
    if examined.suspects:
        _suspects(page, examined)
    sections = (
        ("Under more than one label", examined.conflicts),
        ("Near duplicates", examined.near),
    )
    for title, groups in sections:
        if groups:
            page.section(title)
            _cut_note(page, len(groups))
            for number, group in enumerate(groups[:MOST_GROUPS], 1):
                _group(page, examined, number, group)
    if examined.exact:
        page.section("Identical photos")
        page.text("One thumbnail stands for each group; its files are listed below it.")
        _cut_note(page, len(examined.exact))
        _identical(page, examined)
    _single_photos(page, examined, found)
    page.write(path)


def _overview(page: Page, examined: Examined, found: Sequence[Finding]) -> None:
    photos, counts = examined.photos, examined.counts()
    readable = examined.readable()
    page.facts(
        {
            "Photos": len(photos),
            "Readable": len(readable),
            "Different pictures": len(set(examined.pictures[readable].tolist())),
            "Classes": len(counts),
            "Identical groups": len(examined.exact),
            "Near-duplicate groups": len(examined.near),
        }
    )
    page.section("Findings")
    rows = [(LEVELS[f.kind], f.what, len(f.files) or None, f.cure) for f in found]
    if rows:
        page.table(("level", "finding", "photos", "cure"), rows)
    page.section("Classes")
    pictures = {label: set() for label in counts}
    for i in readable:
        pictures[examined.label(i)].add(int(examined.pictures[i]))
    page.table(
        ("class", "photos", "share", "different pictures"),
        [
            (label, n, percent(n / max(1, len(readable))), len(pictures[label]))
            for label, n in counts.items()
        ],
    )
    if examined.leaks:
        page.section("Leak")
        page.table(
            ("split", "identical twin in train", "identical or near twin in train"),
            [(k.split, percent(k.identical), percent(k.alike)) for k in examined.leaks],
            "Shares of the validation photos, for the split a training would make of this folder"
            " and for one that looks at the classes only; given is the table's own column split.",
        )


def _cut_note(page: Page, groups: int) -> None:
    if groups > MOST_GROUPS:
        page.note(
            "info", f"The first {MOST_GROUPS} of {groups:,} groups; `check.json` has all of them."
        )


def _group(page: Page, examined: Examined, number: int, group: Sequence[int]) -> None:
    """One thumbnail for each content of the group, and the names of all its files."""
    photos = examined.photos
    contents: dict[str, list[int]] = {}
    for i in group:
        contents.setdefault(photos.digests[i], []).append(i)
    shown = list(contents.values())[:MOST_PHOTOS]
    labels = {examined.label(i) for i in group}
    title = f"Group {number}" + (f", {labels.pop()}" if len(labels) == 1 else "")
    names = "; ".join(
        f"{position}. "
        + " = ".join(
            photos.files[i] + (f" ({examined.label(i)})" if labels else "") for i in copies
        )
        for position, copies in enumerate(shown, 1)
    )
    left_out = f"; {len(contents) - len(shown)} more" if len(contents) > len(shown) else ""
    page.figure(
        _sheet(examined, [(copies[0], str(k)) for k, copies in enumerate(shown, 1)], CELL, COLUMNS),
        f"{title}: {names}{left_out}",
        f"Thumbnails of group {number}.",
    )


def _identical(page: Page, examined: Examined) -> None:
    groups = examined.exact[:MOST_GROUPS]
    for start in range(0, len(groups), SHEET):
        part = list(enumerate(groups[start : start + SHEET], start + 1))
        cells = [(group[0], f"{number} (x {len(group)})") for number, group in part]
        page.figure(
            _sheet(examined, cells, SMALL_CELL, SMALL_COLUMNS),
            "Group number, and how many files hold this photo.",
            f"Thumbnails of the groups {start + 1} to {start + len(part)}.",
        )
        page.table(
            ("group", "files", "labels"),
            [
                (
                    number,
                    _first_names([examined.photos.files[i] for i in group]),
                    sorted({examined.label(i) for i in group}),
                )
                for number, group in part
            ],
        )


def _suspects(page: Page, examined: Examined) -> None:
    """A thumbnail of each suspicious picture, with its rank; its copies are in the table."""
    page.section("Labels that look wrong")
    page.text(
        "The most suspicious first. No label is changed: delete the rows of `suspects.csv` whose"
        " photo is labelled right, correct the others, leave the label empty to drop the photo;"
        " then train with `--relabel suspects.csv`."
    )
    shown: dict[tuple[int, int], list[Suspect]] = {}
    for suspect in examined.suspects:
        key = int(examined.pictures[suspect.photo]), int(examined.photos.labels[suspect.photo])
        shown.setdefault(key, []).append(suspect)
    ranked = list(enumerate(shown.values(), 1))
    if len(ranked) > MOST_GROUPS:
        page.note("info", f"The first {MOST_GROUPS} of {len(ranked):,}; `check.json` has them all.")
    for start in range(0, min(len(ranked), MOST_GROUPS), SHEET):
        part = ranked[start : min(start + SHEET, MOST_GROUPS)]
        cells = [
            (copies[0].photo, f"{rank} {examined.label(copies[0].photo)}"[:16])
            for rank, copies in part
        ]
        page.figure(
            _sheet(examined, cells, SMALL_CELL, SMALL_COLUMNS),
            "Rank, as in the table below, and label.",
            f"Thumbnails of the suspects {start + 1} to {start + len(part)}.",
        )
        page.table(
            ("rank", "score", "label", "suggested", "files"),
            [
                (
                    rank,
                    f"{copies[0].score:.2f}",
                    examined.label(copies[0].photo),
                    copies[0].suggested or "none of them",
                    _first_names([examined.photos.files[s.photo] for s in copies]),
                )
                for rank, copies in part
            ],
        )


def _single_photos(page: Page, examined: Examined, found: Iterable[Finding]) -> None:
    position = {examined.photos.files[i]: i for i in examined.readable()}
    grouped = {examined.photos.files[suspect.photo] for suspect in examined.suspects}
    singles = [
        f
        for f in found
        if f.files and f.kind != "bad" and f.files[0] in position and set(f.files) != grouped
    ]
    if singles:
        page.section("Single photos")
        for finding in singles:
            cells = [(position[file], "") for file in finding.files[:MOST_PHOTOS]]
            page.figure(
                _sheet(examined, cells, SMALL_CELL, SMALL_COLUMNS),
                f"{finding.what[0].upper()}{finding.what[1:]}: {_first_names(finding.files)}",
                f"Thumbnails: {finding.what}.",
            )
    if examined.unreadable:
        page.section("Unreadable")
        page.table(("file", "reason"), examined.unreadable[:MOST_GROUPS])


def _first_names(files: Sequence[str]) -> str:
    rest = f" and {len(files) - MOST_PHOTOS:,} more" if len(files) > MOST_PHOTOS else ""
    return ", ".join(files[:MOST_PHOTOS]) + rest


def _sheet(examined: Examined, cells: Sequence[tuple[int, str]], cell: int, columns: int) -> bytes:
    """Whole photos in a grid, each above its caption: a WEBP, clear between them."""
    gap, line = 8, LETTERS + 6

    def small(i: int) -> Image.Image:
        try:
            picture = examined.photos.load(examined.photos.files[i], cell)
        except UnreadablePhoto:  # it was readable a moment ago
            return Image.new("RGB", (1, 1))
        picture.thumbnail((cell, cell), Image.Resampling.BICUBIC)
        return picture

    pictures = list(in_order(small, [i for i, _ in cells]))
    font = ImageFont.load_default(LETTERS)
    rows = [pictures[k : k + columns] for k in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) + line + gap for row in rows]
    width = min(columns, len(cells)) * (cell + gap) - gap
    sheet = Image.new("RGBA", (width, sum(heights) - gap), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    for k, (picture, (_, caption)) in enumerate(zip(pictures, cells, strict=True)):
        row, column = divmod(k, columns)
        x, y = column * (cell + gap), sum(heights[:row])
        sheet.paste(picture, (x, y))
        pen.text((x, y + picture.height + 2), caption, fill=GREY, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=75)
    return buffer.getvalue()

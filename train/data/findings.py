"""What an examination means: one sentence and one cure for each thing that is wrong."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from train.data.cache import MAX_BAD
from train.data.examine import Examined, Look
from train.data.photos import EXTENSIONS, Excluded
from train.page import NoteKind, percent

TINY = 64  # pixels of the shorter side
HUGE = 20e6  # pixels
LONG = 3.0  # longer side / shorter side
BLANK = 4.0  # grey levels of 255
FEW = 10  # photos of a class
# photos to a camera or an editor, but not to us
FOREIGN = frozenset((".heic", ".heif", ".hif", ".jxl", ".jp2", ".dng", ".cr2", ".nef", ".arw"))
IMBALANCE = 5.0  # largest class / smallest class


@dataclass(frozen=True)
class Finding:
    """`what` is wrong, in `files` where it is the files themselves, and the `cure`."""

    kind: NoteKind
    what: str
    cure: str
    files: tuple[str, ...] = ()


def findings(examined: Examined) -> list[Finding]:
    """All findings, the worst first."""
    order = {"bad": 0, "warn": 1, "info": 2}
    every = [
        *_classes(examined),
        *_twins(examined),
        *_labels(examined),
        *_left_out(examined),
        *_looks(examined),
    ]
    return sorted(every, key=lambda finding: order[finding.kind])


def unusable(examined: Examined) -> str | None:
    """Why nothing can be trained on these photos, in one sentence; None where it can."""
    name, bad = examined.photos.name, len(examined.unreadable)
    listed = len(examined.photos) + sum(item.bad for item in examined.photos.excluded)
    for label, count in examined.counts().items():
        if count < 2:
            return (
                f"class {label} of {name} has too few readable photos, {count} instead of at least "
                "two: add some or leave the class out with --classes."
            )
    sides = np.array(examined.photos.sides or ())
    trained = set(examined.photos.labels[np.flatnonzero(sides == "train")].tolist())
    for number, label in enumerate(examined.photos.classes if len(sides) else ()):
        if number not in trained:
            return (
                f"the column split leaves class {label} of {name} without photos in train: move "
                "some of them there."
            )
    if bad > MAX_BAD * listed:
        file, reason = examined.unreadable[0]
        return (
            f"{bad / listed:.1%} of the photos of {name} cannot be read, more than {MAX_BAD:.0%} "
            f"(first: {file}, {reason}): repair or remove them."
        )
    return None


def counted(n: int, thing: str) -> str:
    return f"{n:,} {thing}" + ("" if n == 1 else "s")


def _classes(examined: Examined) -> Iterator[Finding]:
    counts = examined.counts()
    for label, count in counts.items():
        if count < FEW:
            yield Finding(
                "bad" if count < 2 else "warn",
                f"class {label} has {counted(count, 'readable photo')}",
                "add photos or leave it out with --classes",
            )
    smallest, largest = min(counts, key=counts.get), max(counts, key=counts.get)
    if counts[smallest] and counts[largest] > IMBALANCE * counts[smallest]:
        yield Finding(
            "warn",
            f"class {largest} has {counts[largest] / counts[smallest]:.0f} times the photos of "
            f"{smallest}",
            "add photos of the rare classes; compare models by recall of each class",
        )


def _twins(examined: Examined) -> Iterator[Finding]:
    photos = examined.photos
    if examined.conflicts:
        files = tuple(photos.files[i] for group in examined.conflicts for i in group)
        yield Finding(
            "bad",
            f"{counted(len(examined.conflicts), 'picture')} under more than one label",
            "keep the right label of each, delete the other copies",
            files,
        )
    for leak in examined.leaks:
        if not leak.alike:
            continue
        name = "the column split" if leak.split == "given" else f"a {leak.split} split"
        what = (
            f"{name} leaves {percent(leak.alike)} of the validation photos with a "
            f"twin in train ({percent(leak.identical)} identical)"
        )
        if leak.split == "grouped":
            yield Finding("bad", what, "delete the near duplicates, or accuracy will flatter")
        elif leak.split == "given":
            yield Finding("bad", what, "remove the column, and twins are kept together")
        else:
            yield Finding("warn", what, "keep to --split grouped, the default")
    if examined.exact:
        extra = sum(len(group) - 1 for group in examined.exact)
        yield Finding(
            "warn",
            f"{extra:,} identical {'copy' if extra == 1 else 'copies'} "
            f"({percent(extra / len(photos))} of the photos), in "
            f"{counted(len(examined.exact), 'group')}",
            "delete all but one of each group; until then keep them on one side of the split",
        )
    if examined.near:
        files = sum(map(len, examined.near))
        yield Finding(
            "warn",
            f"{counted(len(examined.near), 'group')} of near duplicates, {files:,} photos: "
            "re-encoded, resized, cropped or mirrored",
            "keep the best of each group; until then keep them on one side of the split",
        )


def _labels(examined: Examined) -> Iterator[Finding]:
    if examined.suspects:
        yield Finding(
            "warn",
            "labels that look wrong, or photos of none of the classes",
            "review them in suspects.csv, then train with --relabel suspects.csv",
            tuple(examined.photos.files[suspect.photo] for suspect in examined.suspects),
        )


def _left_out(examined: Examined) -> Iterator[Finding]:
    excluded = examined.photos.excluded
    missing = tuple(e.file for e in excluded if e.reason == "listed, but not there")
    if missing:
        yield Finding("warn", "labels without file", "add the files or delete the rows", missing)
    failed = tuple(file for file, _ in examined.unreadable if file not in set(missing))
    if failed:
        yield Finding("warn", "unreadable", "repair or delete them: they are left out", failed)
    kinds: dict[str, list[str]] = {}
    for item in excluded:
        if not item.bad:
            kinds.setdefault(_left_out_as(item), []).append(item.file)
    for kind, what, cure in (
        (
            "unlabelled",
            "photos without label",
            "give them a row in train.csv, or a class folder where those are the labels",
        ),
        ("again", "listed twice under one label", "delete the second row"),
        ("foreign", "photos in a format that is not read", "convert them to JPEG"),
        ("junk", "files that are no photos", "delete them: they are ignored"),
    ):
        if kind in kinds:
            yield Finding("info", what, cure, tuple(kinds[kind]))


def _left_out_as(item: Excluded) -> str:
    if item.reason.startswith("listed again"):
        return "again"
    ending = "." + item.file.lower().rpartition(".")[2]
    hidden = item.file.rpartition("/")[2].startswith(".")
    beside = item.reason == "not in a class folder" and ending in EXTENSIONS and not hidden
    if beside or item.reason.startswith("no row"):
        return "unlabelled"
    return "foreign" if ending in FOREIGN and not hidden else "junk"


def _looks(examined: Examined) -> Iterator[Finding]:
    """Photos that can be read, but look wrong or may surprise other programs."""
    upright = "nothing: it is undone here, other programs may show them lying"
    rules: tuple[tuple[NoteKind, str, str, Callable[[str, Look], bool]], ...] = (
        ("warn", "blank, of nearly one colour", "delete them", lambda f, k: k.spread < BLANK),
        (
            "warn",
            f"tiny, shorter side under {TINY} px",
            "replace them by larger ones",
            lambda f, k: min(k.size) < TINY,
        ),
        (
            "warn",
            f"longer side over {LONG:.0f} times the shorter",
            "crop them to the dish: training sees the centre square only",
            lambda f, k: max(k.size) > LONG * min(k.size),
        ),
        ("info", "extension of another format", "rename them: content counts here", _misnamed),
        ("info", "turned by their EXIF tag", upright, lambda f, k: _form(k)[3] in range(2, 9)),
        (
            "info",
            "animated or of several pages",
            "keep one picture: the first is used",
            lambda f, k: _form(k)[2] > 1,
        ),
        (
            "info",
            f"huge, over {HUGE / 1e6:.0f} million pixels",
            "nothing; smaller ones decode faster",
            lambda f, k: k.size[0] * k.size[1] > HUGE,
        ),
    )
    readable = [(examined.photos.files[i], examined.looks[i]) for i in examined.readable()]
    for kind, what, cure, applies in rules:
        files = tuple(file for file, look in readable if applies(file, look))
        if files:
            yield Finding(kind, what, cure, files)
    odd = [(file, _form(look)[1]) for file, look in readable if _form(look)[1] not in ("RGB", "L")]
    if odd:
        modes = ", ".join(f"{mode} {n}" for mode, n in Counter(m for _, m in odd).most_common())
        cure = "nothing: they are converted to RGB, transparency to white"
        yield Finding("info", f"odd colour modes ({modes})", cure, tuple(f for f, _ in odd))


def _form(look: Look) -> tuple[str, str, int, int]:
    return look.form or ("", "RGB", 1, 1)


def _misnamed(file: str, look: Look) -> bool:
    if look.form is None:
        return False
    ending = "." + file.rpartition(".")[2].lower()
    named = Image.registered_extensions().get(ending, "")
    return {"MPO": "JPEG"}.get(named, named) != look.form[0]

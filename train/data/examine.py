"""Every photo of a source looked at once and compared with all others: what `check` reports on."""

import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from train.config import DataConfig, RunConfig
from train.data.duplicates import by_appearance, in_order, picture_groups, thumbnail
from train.data.perceptual import SIDE
from train.data.photos import FORMATS, PhotoFolder, Photos, UnreadablePhoto
from train.data.shards import ShardReader
from train.data.split import split_photos
from train.data.suspects import Suspect, find_suspects


@dataclass(frozen=True)
class Look:
    """What one content shows, or the reason why it shows nothing.

    size      (width, height) in pixels, upright
    spread    standard deviation of its grey thumbnail, in levels of 255
    pixels    SHA-256 of size and RGB values; None where a huge JPEG was decoded at reduced scale
    form      format, mode, number of frames and EXIF orientation by the header; None for drawings
    """

    reason: str | None = None
    size: tuple[int, int] = (0, 0)
    spread: float = 0.0
    pixels: bytes | None = None
    form: tuple[str, str, int, int] | None = None


@dataclass(frozen=True)
class Leak:
    """Shares of the validation photos with an identical, or a like, photo in train, 0 to 1."""

    split: str
    identical: float
    alike: float


@dataclass(frozen=True)
class Examined:
    """What was found in `photos`; groups hold positions in them, two or more each.

    looks       one for each photo
    pictures    int64 [N]: equal for photos that show the same picture
    unreadable  (file, reason), also of files that were listed and are not there
    exact       groups of identical content: of the file, or of the pixels it holds
    near        groups that show the same picture in several contents, identical copies included
    conflicts   groups of either kind under more than one label
    leaks       what the project's own split, a random and a given one leave on both sides
    suspects    labels that look wrong, the most suspicious first; none unless they were looked for
    """

    photos: Photos
    looks: list[Look]
    pictures: np.ndarray
    unreadable: list[tuple[str, str]]
    exact: list[list[int]]
    near: list[list[int]]
    conflicts: list[list[int]]
    leaks: list[Leak]
    suspects: list[Suspect] = field(default_factory=list)

    def readable(self) -> np.ndarray:
        """int64: positions of the photos that can be shown."""
        return np.array([i for i, look in enumerate(self.looks) if look.reason is None], np.int64)

    def counts(self) -> dict[str, int]:
        """Readable photos of each class."""
        labels = self.photos.labels[self.readable()]
        counts = np.bincount(labels, minlength=len(self.photos.classes))
        return dict(zip(self.photos.classes, counts.tolist(), strict=True))

    def label(self, i: int) -> str:
        return self.photos.classes[self.photos.labels[i]]


def examine(photos: Photos, *, labels: bool = False, progress: bool = True) -> Examined:
    """Decode each content once, in parallel, and find out which photos are the same; with `labels`
    also which labels look wrong."""
    first, content = by_appearance(photos.digests)
    names = [photos.files[i] for i in first]
    looks: list[Look] = []
    thumbnails = np.zeros((len(names), SIDE, SIDE), np.uint8)
    seen = in_order(lambda name: look_at(photos, name), names)
    bar = tqdm(seen, "looking", len(names), unit=" photos", disable=not progress)
    for i, (look, small) in enumerate(bar):
        looks.append(look)
        if small is not None:
            thumbnails[i] = small
    same = _equal([look.pixels for look in looks])
    alike = picture_groups(thumbnails, same, progress=progress)
    same = _with_reduced(photos, names, looks, same, alike)
    examined = _summary(photos, [looks[c] for c in content], same[content], alike[content])
    if not labels:
        return examined
    found = find_suspects(photos, examined.pictures, examined.readable(), progress=progress)
    return replace(examined, suspects=found)


def _summary(photos: Photos, looks: list[Look], same: np.ndarray, alike: np.ndarray) -> Examined:
    readable = np.array([i for i, look in enumerate(looks) if look.reason is None], np.int64)
    exact = _groups(same, readable)
    near = [group for group in _groups(alike, readable) if len(set(same[group])) > 1]
    in_near = {i for group in near for i in group}
    everything = [*near, *(group for group in exact if group[0] not in in_near)]
    missing = [(item.file, item.reason) for item in photos.excluded if item.bad]
    damaged = [(f, look.reason) for f, look in zip(photos.files, looks, strict=True) if look.reason]
    return Examined(
        photos=photos,
        looks=looks,
        pictures=alike,
        unreadable=[*missing, *damaged],
        exact=exact,
        near=near,
        conflicts=[group for group in everything if len(set(photos.labels[group])) > 1],
        leaks=list(_leaks(photos.subset(readable), same[readable], alike[readable])),
    )


def look_at(photos: Photos, file: str) -> tuple[Look, np.ndarray | None]:
    """Decode one photo, at reduced scale where it is a huge JPEG; also its thumbnail."""
    try:
        picture = photos.load(file, SIDE)
    except UnreadablePhoto as error:
        return Look(reason=str(error)), None
    size, form = picture.size, None
    if isinstance(photos.load, PhotoFolder | ShardReader):
        size, form = _header(photos.load.read(file))
    pixels = _pixels(picture) if picture.size == size else None
    small = thumbnail(picture)
    return Look(size=size, spread=float(small.std()), pixels=pixels, form=form), small


def _header(content: bytes) -> tuple[tuple[int, int], tuple[str, str, int, int]]:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # a damaged EXIF block: the decoder takes the photo as upright, too
            orientation = 1
        width, height = image.size
        size = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
        if image.format == "MPO":  # a phone's JPEG with a second picture beside it; no animation
            return size, ("JPEG", image.mode, 1, orientation)
        return size, (image.format, image.mode, _frames(image), orientation)


def _frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # Pillow's plug-ins raise many kinds for a damaged frame after the first
        return 1


def _pixels(picture: Image.Image) -> bytes:
    digest = hashlib.sha256(repr(picture.size).encode())
    digest.update(picture.tobytes())
    return digest.digest()


def _equal(pixels: Sequence[bytes | None]) -> np.ndarray:
    """int64: for each position the first with equal pixels, itself where they are not known."""
    first: dict[bytes, int] = {}
    return np.array(
        [i if p is None else first.setdefault(p, i) for i, p in enumerate(pixels)], np.int64
    )


def _with_reduced(
    photos: Photos, names: list[str], looks: list[Look], same: np.ndarray, alike: np.ndarray
) -> np.ndarray:
    """`same`, once photos decoded at reduced scale are decoded in full, where their pixels matter:
    another photo shows the same picture in the same size."""
    twins = Counter((group, look.size) for group, look in zip(alike.tolist(), looks, strict=True))
    todo = [
        i
        for i, look in enumerate(looks)
        if look.reason is None and look.pixels is None and twins[int(alike[i]), look.size] > 1
    ]
    if not todo:
        return same
    whole = in_order(lambda i: _pixels(photos.load(names[i], None)), todo)
    known = dict(zip(todo, whole, strict=True))
    return _equal([known.get(i, look.pixels) for i, look in enumerate(looks)])


def _groups(numbers: np.ndarray, positions: np.ndarray) -> list[list[int]]:
    """The positions that share a number, in order of appearance."""
    members: dict[int, list[int]] = {}
    for position in positions.tolist():
        members.setdefault(int(numbers[position]), []).append(position)
    return [group for group in members.values() if len(group) > 1]


def _leaks(photos: Photos, same: np.ndarray, alike: np.ndarray) -> Iterator[Leak]:
    if not len(photos):
        return
    for kind in ("grouped", "random"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the leak that is measured here
            split = split_photos(
                photos,
                pictures=alike,
                val_fraction=DataConfig().val_fraction,
                kind=kind,
                seed=RunConfig().seed,
            )
        yield _leak(kind, split.train, split.val, same, alike)
    if photos.sides:
        in_val = np.array(photos.sides) == "val"
        yield _leak("given", np.flatnonzero(~in_val), np.flatnonzero(in_val), same, alike)


def _leak(
    kind: str, train: np.ndarray, val: np.ndarray, same: np.ndarray, alike: np.ndarray
) -> Leak:
    return Leak(kind, leaked_share(same, train, val), leaked_share(alike, train, val))


def leaked_share(groups: np.ndarray, train: np.ndarray, val: np.ndarray) -> float:
    """Share of the positions `val` whose group has a member in `train`, 0 to 1."""
    return float(np.isin(groups[val], groups[train]).mean()) if len(val) else 0.0

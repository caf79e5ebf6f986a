"""Photos as every source lists them, and how one photo file becomes an upright RGB picture."""

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from PIL import Image
from tqdm import tqdm

from train.data.known import Known
from train.errors import DataError, UsageError

# What Pillow may open: the formats photos come in. Among the others some start foreign programs.
# (JPEG covers MPO, the pairs some phones write.) Not every build of Pillow knows AVIF.
Image.init()
FORMATS = [
    kind
    for kind in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
    if kind in Image.OPEN
]
EXTENSIONS = frozenset(
    f".{ending}"
    for ending in "jpg jpeg jpe jfif mpo png webp avif gif bmp tif tiff ppm".split()  # noqa: SIM905
)

# Room for a 108-megapixel phone (0.5 GB while it is decoded); more is refused from the header.
# Pillow's limit is lower; at ours it would only warn of what is refused anyway.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS = 2**27
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_ORIENTATION = 0x0112  # the EXIF tag; values 2..8 say how to turn the stored picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadablePhoto(Exception):
    """One photo that cannot be shown; the message is the reason, in a few words."""


@dataclass(frozen=True)
class Excluded:
    """A file that is not trained on. `bad`: it should have been a photo (junk is not)."""

    file: str
    reason: str
    bad: bool = True


@dataclass(frozen=True, repr=False)
class Photos:
    """N labelled photos of one source, and what the source left out.

    name      for display
    classes   sorted class names
    files     N unique names relative to the source's root; what split.csv writes
    labels    int64 [N], positions in `classes`
    digests   N SHA-256 sums of the content: equal content, equal digest
    excluded  files left out, each with its reason
    load      (file, shorter side wanted or None) -> upright RGB picture; raises UnreadablePhoto.
              The picture may be smaller than stored, but never under three times the side wanted
    bad_share share of the photos first listed that were bad, 0 to 1
    sides     N times "train" or "val", where the source itself says so
    """

    name: str
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray
    digests: tuple[str, ...]
    excluded: tuple[Excluded, ...]
    load: Callable[[str, int | None], Image.Image]
    bad_share: float = 0.0
    sides: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        left_out = f", {len(self.excluded)} left out" if self.excluded else ""
        return f"Photos({self.name}: {len(self)} in {len(self.classes)} classes{left_out})"

    def read(self, i: int) -> np.ndarray:
        """Photo `i` in full: uint8 [height, width, 3]. Raises UnreadablePhoto."""
        return np.asarray(self.load(self.files[i], None))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Photos":
        """The photos at `indices`, in that order; classes and the list of excluded files stay."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            files=tuple(self.files[i] for i in chosen),
            labels=self.labels[chosen],
            digests=tuple(self.digests[i] for i in chosen),
            sides=self.sides and tuple(self.sides[i] for i in chosen),
        )


def choose_classes(available: Iterable[str], wanted: tuple[str, ...], source: str) -> list[str]:
    """The classes to train on, sorted: `wanted`, or all. Raises UsageError for an unknown one."""
    available = sorted(set(available))
    unknown = sorted(set(wanted) - set(available))
    if unknown:
        shown = ", ".join(available[:12]) + (", ..." if len(available) > 12 else "")
        raise UsageError(
            f"--classes names {', '.join(unknown)}, which {source} lacks: choose from {shown}."
        )
    chosen = sorted(set(wanted)) or available
    if len(chosen) < 2:
        raise DataError(
            f"{source} gives {len(chosen)} class{'' if chosen else 'es'} "
            f"({', '.join(chosen) or 'none'}), and a classifier needs at least two."
        )
    return chosen


def list_photos(
    name: str,
    root: Path,
    entries: Sequence[tuple[str, str, str]],
    classes: Sequence[str],
    excluded: Sequence[Excluded] = (),
) -> Photos:
    """Photos from files under `root`.

    entries: (file relative to root, label, where it is listed, for messages). Entries that are not
    there are excluded. Raises DataError for a path that leaves `root` or when no file is left.
    """
    _check_inside(root, entries)
    results = _digests(root, [file for file, _, _ in entries])
    kept = [
        (file, label, result)
        for (file, label, _), result in zip(entries, results, strict=True)
        if isinstance(result, str)
    ]
    missing = [result for result in results if isinstance(result, Excluded)]
    if not kept:
        example = f" (first: {missing[0].file}, {missing[0].reason})" if missing else ""
        raise DataError(
            f"none of the {len(entries)} photos of {name} can be opened in {root}{example}: "
            "check the path."
        )
    position = {label: i for i, label in enumerate(classes)}
    return Photos(
        name=name,
        classes=tuple(classes),
        files=tuple(file for file, _, _ in kept),
        labels=np.array([position[label] for _, label, _ in kept], dtype=np.int64),
        digests=tuple(result for _, _, result in kept),
        excluded=(*excluded, *missing),
        load=PhotoFolder(root),
        bad_share=len(missing) / len(entries),
    )


def _check_inside(root: Path, entries: Sequence[tuple[str, str, str]]) -> None:
    """Raise DataError for an entry that is, or lies behind, a link out of `root`."""
    real_root = os.path.realpath(root)

    @cache
    def inside(path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(real_root)

    for file, _, where in entries:
        path = os.path.join(root, file)
        if not inside(os.path.dirname(path)) or (os.path.islink(path) and not inside(path)):
            raise DataError(
                f"{where} leads out of {root} ({file!r}): put the photo itself into the folder."
            )


def _digests(root: Path, files: Sequence[str]) -> list[str | Excluded]:
    """The SHA-256 of each file below `root`, or why it has none. Read once, in parallel; as long
    as a file stays as it is the sum is remembered."""
    known = Known(f"digests of {os.path.realpath(root)}")
    results: list[str | Excluded | None] = []
    for file in files:
        try:
            file.encode()
            status = os.stat(root / file)
            if not stat.S_ISREG(status.st_mode):
                results.append(Excluded(file, "is not a regular file"))
            else:
                digest = known.get(file, status)
                results.append(digest if isinstance(digest, str) else None)
        except UnicodeEncodeError:
            results.append(Excluded(_printable(file), "file name is not valid text"))
        except (FileNotFoundError, NotADirectoryError):
            results.append(Excluded(file, "listed, but not there"))
        except (OSError, ValueError) as error:
            results.append(Excluded(file, getattr(error, "strerror", None) or str(error)))

    def read(i: int) -> None:
        file = files[i]
        try:
            with (root / file).open("rb") as stream:
                status = os.fstat(stream.fileno())
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            known.put(file, status, digest)
            results[i] = digest
        except OSError as error:
            results[i] = Excluded(file, error.strerror or str(error))

    unread = [i for i, result in enumerate(results) if result is None]
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        list(tqdm(pool.map(read, unread), "hashing", len(unread), unit=" files", delay=1))
    known.save()
    return results


def photo_files(folder: Path) -> tuple[list[str], list[Excluded]]:
    """All photos below `folder` (sorted, with forward slashes), and the junk beside them."""
    photos, junk = [], []
    for path, folders, files in os.walk(folder, onerror=_unlisted):
        below = Path(path).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        for name in folders:
            if os.path.islink(os.path.join(path, name)):
                link = _printable(prefix + name)
                junk.append(Excluded(link, "a link to a folder, not followed", bad=False))
        for file in sorted(files):
            if file.startswith(".") or os.path.splitext(file)[1].lower() not in EXTENSIONS:
                heic = file.lower().endswith((".heic", ".heif"))
                reason = "HEIC is not read: convert it to JPEG" if heic else "not a photo"
                junk.append(Excluded(_printable(prefix + file), reason, bad=False))
            else:
                photos.append(prefix + file)
    return photos, junk


def _unlisted(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} cannot be listed ({error.strerror}).") from error


def _printable(file: str) -> str:
    """Names that are not valid text hold lone surrogates, which cannot be written to a report."""
    return file.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class PhotoFolder:
    """Loads photo files below `root`."""

    root: Path

    def __call__(self, file: str, shorter: int | None = None) -> Image.Image:
        return decode(self.root / file, shorter)

    def read(self, file: str) -> bytes:
        """The photo file as it is stored. Raises DataError where it cannot be read."""
        try:
            return (self.root / file).read_bytes()
        except OSError as error:
            raise DataError(
                f"{self.root / file} cannot be read ({error.strerror}): try again."
            ) from error


def decode(source: Path | bytes, shorter: int | None = None) -> Image.Image:
    """The photo at a path, or in memory, upright and in RGB; the first frame of an animation.

    shorter: the side the caller will shrink the shorter side to. A JPEG of at least six times
    that is then decoded at a reduced scale, still at least three times as large as asked.
    Raises UnreadablePhoto with the reason, DataError where the system refuses to read the file.
    """
    try:
        with _open(source) as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            _check_whole(file, image.format)
            orientation = _orientation(image)
            if shorter is not None:
                scale = 3 * shorter / min(width, height)
                image.draft(None, (round(width * scale), round(height * scale)))
            picture = _to_rgb(image)
    except (UnreadablePhoto, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise UnreadablePhoto("not an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadablePhoto(f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except Exception as error:  # Pillow's plug-ins raise a dozen kinds for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{source} cannot be read ({error.strerror}): try again.") from error
        raise UnreadablePhoto(f"damaged: {str(error) or type(error).__name__}") from error
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _open(source: Path | bytes) -> BinaryIO:
    file = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    if not file.seek(0, os.SEEK_END):
        file.close()
        raise UnreadablePhoto("empty file")
    file.seek(0)
    return file


def _check_whole(file: BinaryIO, kind: str | None) -> None:
    """Raise for damage that Pillow decodes to a partly grey picture: a PNG with a wrong checksum; a
    JPEG, WEBP or AVIF that ends in zeros, as interrupted copies do whose length was set first."""
    place = file.tell()
    if kind == "PNG":
        file.seek(0)
        with Image.open(file, formats=["PNG"]) as image:
            image.verify()
    elif kind in ("JPEG", "MPO", "WEBP", "AVIF"):
        end = file.seek(0, os.SEEK_END)
        if kind == "WEBP":  # what follows the length in its header is no part of it
            file.seek(4)
            end = min(end, 8 + int.from_bytes(file.read(4), "little"))
        file.seek(max(0, end - 64))
        if not any(file.read(min(end, 64))):
            file.seek(0)
            content = file.read() if kind in ("JPEG", "MPO") else b""
            # zeros may follow the end marker, which no scan of the picture may
            if content.rfind(b"\xff\xd9") <= content.rfind(b"\xff\xda"):
                raise UnreadablePhoto("damaged: its end is missing")
    file.seek(place)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block does not make the picture unreadable
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _sixteen_bit_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    image.load()
    return image.convert("RGB")


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits: Pillow's own conversion cuts them off at 255."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise UnreadablePhoto(f"pixels of mode {image.mode} have no known range")
    grey = (values.astype(np.uint32) * 255 + 32767) // 65535
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")

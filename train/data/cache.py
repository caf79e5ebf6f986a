"""Photos decoded once into one memory-mapped file of squares, and never again.

The file is the squares, uint8 [M, size, size, 3], then a JSON footer (which contents could not be
read, and why), its length (8 bytes) and the SHA-256 of everything before. It is written under
another name and moved into place, so a killed build leaves nothing that could be taken for a cache.
Squares are appended, not written through a memory map: a full disk is then an error, not a SIGBUS.
The checksum of a file that was not written here, or has changed since, is verified once; a start
with a known file reads no more than its footer.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from kernels.store import cache_dir as default_cache_dir
from train.config import DataConfig
from train.data.known import Known
from train.data.photos import Excluded, Photos, UnreadablePhoto
from train.errors import FOREIGN, DataError, DiskError

TRANSFORM = "centre square, bicubic antialiased, 3"  # raise the number when a change alters pixels
MAX_BAD = DataConfig.max_bad
_TAIL = 8 + 32
_STALE_SECONDS = 3600


def load_images(
    photos: Photos,
    size: int,
    *,
    cache_dir: Path | None = None,
    progress: bool = True,
    max_bad: float = MAX_BAD,
) -> tuple[np.ndarray, Photos]:
    """All photos as squares: uint8 [N, size, size, 3], read-only, and the Photos they show.

    The shorter side is resized to `size` (antialiased), the longer one cropped around its centre.
    The first call decodes in parallel into a cache in `cache_dir` (default: the user's cache
    folder), later ones map it; a damaged cache is built again. Photos that cannot be read are moved
    to `excluded`. Raises DataError if more than `max_bad` of the photos are bad or a class keeps
    fewer than two, DiskError if the cache cannot be written; warns below ten photos in a class.
    """
    folder = cache_dir or default_cache_dir()
    key = hashlib.sha256("\n".join([TRANSFORM, str(size), *photos.digests]).encode()).hexdigest()
    path = folder / f"{key[:32]}.images"
    known = Known("caches", folder)
    failed = _footer(path, size, known, progress)
    if failed is None:
        failed = _build(path, photos, size, progress)
        known.put(path.name, path.stat(), True, own=True)
    known.save()
    readable = _readable(photos, failed, max_bad)
    return np.memmap(path, np.uint8, "r", shape=(len(readable), size, size, 3)), readable


def square(image: Image.Image, size: int) -> np.ndarray:
    """The centre square of an RGB picture, antialiased to uint8 [size, size, 3]."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _footer(path: Path, size: int, known: Known, progress: bool) -> dict[str, str] | None:
    """The unreadable contents a sound cache records, by digest; None if it must be built."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            total = status.st_size
            if known.get(path.name, status) is not True:
                if not _sound(file, total, progress):
                    return None
                known.put(path.name, status, True)
            file.seek(total - _TAIL)
            footer_bytes = int.from_bytes(file.read(8), "little")
            pixels = total - _TAIL - footer_bytes
            if pixels < 0 or pixels % (size * size * 3):
                return None
            file.seek(pixels)
            return json.loads(file.read(footer_bytes))
    except FOREIGN:
        return None


def _sound(file: BinaryIO, total: int, progress: bool) -> bool:
    """Whether the last 32 of `total` bytes are the SHA-256 of all others."""
    checksum = hashlib.sha256()
    remaining = total - 32
    with tqdm(
        desc="checking the cache",
        total=total,
        unit="B",
        unit_scale=True,
        delay=1,
        disable=not progress,
    ) as bar:
        while remaining > 0 and (chunk := file.read(min(remaining, 2**24))):
            checksum.update(chunk)
            remaining -= len(chunk)
            bar.update(len(chunk))
    return file.read() == checksum.digest()


def _build(path: Path, photos: Photos, size: int, progress: bool) -> dict[str, str]:
    """Write the cache; returns the unreadable contents. Raises DiskError."""
    needed = len(photos) * size * size * 3
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    with _writing(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        free = shutil.disk_usage(path.parent).free
    if progress:
        print(
            f"cache: {len(photos):,} photos at {size} px, {needed / 1e6:,.1f} MB of "
            f"{free / 1e6:,.0f} MB free in {path.parent}"
        )
    try:
        with _writing(path, needed):
            if needed > free:
                raise OSError(errno.ENOSPC, f"{free / 1e6:,.1f} MB are free")
            with temporary.open("w+b") as file:
                checksum = hashlib.sha256()
                failed = _write_squares(file, checksum, photos, size, progress)
                footer = json.dumps(failed).encode()
                checksum.update(footer := footer + len(footer).to_bytes(8, "little"))
                file.write(footer + checksum.digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return failed


@contextlib.contextmanager
def _writing(path: Path, needed: int) -> Iterator[None]:
    """Make a DiskError of what the system says against `needed` bytes at `path`."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"the image cache {path} cannot be written ({error.strerror or error}): it needs "
            f"{needed / 1e6:,.1f} MB; free some or set LAPIS_CACHE to another folder."
        ) from error


def _remove_stale(folder: Path) -> None:
    """Leftovers of killed runs; a running one has written within the hour."""
    for temporary in (*folder.glob("*.tmp"), *folder.glob(".*.known.json.*")):
        with contextlib.suppress(FileNotFoundError):  # another build may clean up at the same time
            if time.time() - temporary.stat().st_mtime > _STALE_SECONDS:
                temporary.unlink()


def _write_squares(
    file: BinaryIO, checksum: "hashlib._Hash", photos: Photos, size: int, progress: bool
) -> dict[str, str]:
    """Appends the square of every readable photo, in order; decodes equal contents once."""
    first: dict[str, str] = {}
    for name, digest in zip(photos.files, photos.digests, strict=True):
        first.setdefault(digest, name)
    decoded = _decode_in_order(photos, list(first.values()), size)
    written: dict[str, int] = {}
    failed: dict[str, str] = {}
    description = f"decoding to {size} px"
    for digest in tqdm(photos.digests, description, unit=" images", disable=not progress):
        if digest in failed:
            continue
        if digest in written:
            file.seek(written[digest])
            pixels = file.read(size * size * 3)
            file.seek(0, os.SEEK_END)
        else:
            result = next(decoded)
            if isinstance(result, str):
                failed[digest] = result
                continue
            written[digest] = file.tell()
            pixels = result.tobytes()
        file.write(pixels)
        checksum.update(pixels)
    return failed


def _decode_in_order(photos: Photos, names: list[str], size: int) -> Iterator[np.ndarray | str]:
    """The square of each file, or the reason it has none; a bounded number is kept ahead."""

    def decode(name: str) -> np.ndarray | str:
        try:
            return square(photos.load(name, size), size)
        except UnreadablePhoto as error:
            return str(error)

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        queue = iter(names)
        ahead = deque(pool.submit(decode, name) for name in islice(queue, 4 * threads))
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(decode, name) for name in islice(queue, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def _readable(photos: Photos, failed: dict[str, str], max_bad: float) -> Photos:
    """The photos that can be read; raises or warns when too few are left."""
    readable = [i for i, digest in enumerate(photos.digests) if digest not in failed]
    unreadable = tuple(
        Excluded(file, failed[digest])
        for file, digest in zip(photos.files, photos.digests, strict=True)
        if digest in failed
    )
    share = 1 - (1 - photos.bad_share) * len(readable) / len(photos)
    excluded = (*photos.excluded, *unreadable)
    if share > max_bad:
        bad = [item for item in excluded if item.bad]
        listed = "; ".join(f"{item.file}: {item.reason}" for item in bad[:5])
        raise DataError(
            f"{share:.1%} of the photos of {photos.name} are bad, more than {max_bad:.0%} ({listed}"
            f"{'; ...' if len(bad) > 5 else ''}): repair or remove them, or raise --max-bad."
        )
    result = replace(photos.subset(readable), excluded=excluded, bad_share=share)
    counts = np.bincount(result.labels, minlength=len(photos.classes))
    for label, count in zip(photos.classes, counts, strict=True):
        if count < 2:
            raise DataError(
                f"class {label} of {photos.name} has too few readable photos, {count} instead of "
                "at least two: add some or leave the class out with --classes."
            )
        if count < 10:
            warnings.warn(f"class {label} has only {count} photos.", stacklevel=3)
    return result

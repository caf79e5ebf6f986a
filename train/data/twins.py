"""What a checkpoint remembers of its training photos, so that their twins are known again."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from train.data.duplicates import in_order, picture_groups, thumbnail
from train.data.perceptual import SIDE
from train.data.photos import Photos, UnreadablePhoto

MOST_THUMBNAILS = 20_000  # 82 MB in a checkpoint; of a larger set only identical files are known


def make_manifest(images: np.ndarray, photos: Photos, rows: np.ndarray) -> dict[str, Any]:
    """The photos at `rows`, as tensors: `digests` uint8 [N, 32], and `thumbnails`
    uint8 [N, SIDE, SIDE] of as many different contents, or none where they are too many.

    images: uint8 [M, S, S, 3], the squares of all `photos`.
    """
    digests = dict.fromkeys(photos.digests[row] for row in rows)
    first = {photos.digests[row]: row for row in reversed(rows)}
    thumbnails = np.empty((0, SIDE, SIDE), np.uint8)
    if len(digests) <= MOST_THUMBNAILS:
        squares = (Image.fromarray(images[first[digest]]) for digest in digests)
        thumbnails = np.stack([thumbnail(picture) for picture in squares])
    packed = np.frombuffer(b"".join(map(bytes.fromhex, digests)), np.uint8).reshape(-1, 32)
    return {
        "digests": torch.from_numpy(packed.copy()),
        "thumbnails": torch.from_numpy(thumbnails),
    }


def twins_of(photos: Photos, manifest: dict[str, Any]) -> np.ndarray:
    """bool [N]: the photos that show a picture of the manifest: the same file, or where the
    manifest has thumbnails also a crop, a mirror image or a copy saved again."""
    known = {bytes(row).hex() for row in manifest["digests"].numpy()}
    same = np.array([digest in known for digest in photos.digests])
    trained_on = manifest["thumbnails"].numpy()
    if not len(trained_on) or same.all():
        return same

    def look(file: str) -> np.ndarray:
        try:
            return thumbnail(_centre_square(photos.load(file, SIDE)))
        except UnreadablePhoto:
            return np.zeros((SIDE, SIDE), np.uint8)

    others = np.flatnonzero(~same)
    looks = np.stack(list(in_order(look, [photos.files[i] for i in others])))
    both = np.concatenate([trained_on, looks])
    groups = picture_groups(both, np.arange(len(both)), progress=False)
    same[others] = np.isin(groups[len(trained_on) :], groups[: len(trained_on)])
    return same


def _centre_square(picture: Image.Image) -> Image.Image:
    """As the training photos were stored."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))

"""Which photos show the same picture: copies, re-encodings, resizes, crops, mirror images.

A thumbnail stands for each photo. `perceptual` proposes pairs in time that grows with the photos,
not with their pairs; a pair counts only when its pixels, brought into register, agree nearly
everywhere.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from train.data.perceptual import SIDE, Candidate, candidates
from train.data.photos import Photos, UnreadablePhoto

Item = TypeVar("Item")
Result = TypeVar("Result")

_TRIES = 8  # candidates of one photo whose pixels are compared
_REGISTERED = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-4)
_BLOCK = 8  # pixels
_DETAIL = 1.0  # grey levels of 255 by which a block must vary to say anything
_LEAST_BLOCKS = 8  # of 64 that must say something
# The lower quartile of the blocks' correlations: copies, crops and re-encodings stay above 0.96,
# the closest of drawn dishes, whose plates fit each other, below 0.8.
_AGREEMENT = 0.88


def picture_groups(
    thumbnails: np.ndarray, contents: np.ndarray, *, progress: bool = True
) -> np.ndarray:
    """The group of each photo, numbered from 0; photos of one group show the same picture.

    thumbnails: uint8 [N, SIDE, SIDE]. contents: int [N], equal where the content is identical.
    Returns int64 [N]: the connected components of "identical" and "looks alike". Pictures almost
    without detail (one colour, a soft gradient) are like nothing but their identical copies.
    """
    first, of_content = by_appearance(contents)
    detailed = np.array([i for i in first if _blocks(_details(thumbnails[i])) >= _LEAST_BLOCKS])
    groups = Groups(len(thumbnails))
    for i, content in enumerate(of_content):
        groups.join(i, first[content])
    tries = Counter()
    for pair in candidates(thumbnails, detailed, progress):
        if tries[pair.large] >= _TRIES or groups.joined(pair.large, pair.small):
            continue
        tries[pair.large] += 1
        if agreement(thumbnails[pair.large], thumbnails[pair.small], pair) >= _AGREEMENT:
            groups.join(pair.large, pair.small)
    return groups.numbers()


def photo_groups(photos: Photos, *, progress: bool = True) -> np.ndarray:
    """`picture_groups` of all photos, each content decoded once; unreadable ones stay alone."""

    def look(file: str) -> np.ndarray:
        try:
            return thumbnail(photos.load(file, SIDE))
        except UnreadablePhoto:
            return np.zeros((SIDE, SIDE), np.uint8)

    first, contents = by_appearance(photos.digests)
    looks = in_order(look, [photos.files[i] for i in first])
    thumbnails = np.empty((len(first), SIDE, SIDE), np.uint8)
    for i, seen in enumerate(
        tqdm(looks, "looking for twins", len(first), unit=" photos", disable=not progress)
    ):
        thumbnails[i] = seen
    return picture_groups(thumbnails, np.arange(len(first)), progress=progress)[contents]


def thumbnail(picture: Image.Image) -> np.ndarray:
    """The picture in grey, squeezed to uint8 [SIDE, SIDE]."""
    return np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def by_appearance(values: Sequence | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions where a value is first seen, and for each position which of those it repeats."""
    first, inverse = np.unique(values, return_index=True, return_inverse=True)[1:]
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, computed by threads; a bounded number is kept ahead."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        queue = iter(items)
        ahead = deque(pool.submit(function, item) for item in islice(queue, 4 * threads))
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(function, item) for item in islice(queue, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


class Groups:
    """Positions 0 .. n-1, joined pair by pair (union-find with path halving)."""

    def __init__(self, n: int) -> None:
        self._parents = list(range(n))

    def _root(self, i: int) -> int:
        parents = self._parents
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    def join(self, i: int, j: int) -> None:
        a, b = sorted((self._root(i), self._root(j)))
        self._parents[b] = a

    def joined(self, i: int, j: int) -> bool:
        return self._root(i) == self._root(j)

    def numbers(self) -> np.ndarray:
        """int64 [n]: the group of each position, numbered from 0 by first appearance."""
        roots = [self._root(i) for i in range(len(self._parents))]
        return np.unique(np.array(roots, dtype=np.int64), return_inverse=True)[1]


def agreement(large: np.ndarray, small: np.ndarray, pair: Candidate) -> float:
    """How well the details of two thumbnails agree once they are in register, at most 1.

    The lower quartile, over blocks with detail in either, of the correlation within the block. So
    light and contrast do not matter, a caption over a part is forgiven, and a common plain
    background does not make two pictures one. Registration: Evangelidis and Psarakis, "Parametric
    image alignment using enhanced correlation coefficient maximization", PAMI 2008.
    """
    left, top, width, height = pair.window
    still = np.ascontiguousarray(small[:, ::-1]) if pair.mirrored else small
    start = [
        [width, 0, left * SIDE + (width - 1) / 2],
        [0, height, top * SIDE + (height - 1) / 2],
    ]
    start = np.array(start, np.float32)
    try:
        warp = cv2.findTransformECC(
            _even(still), _even(large), start, cv2.MOTION_AFFINE, _REGISTERED, None, 3
        )[1]
    except cv2.error:  # it does not converge: nothing in one is like the other
        return -1.0
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(
        large.astype(np.float32), warp, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
    inside = cv2.warpAffine(np.ones((SIDE, SIDE), np.float32), warp, (SIDE, SIDE), flags=flags)
    covered = inside > 0.99
    a, b = (_details(picture) * covered for picture in (moved, still))
    products, squares_a, squares_b = (_block_sums(x) for x in (a * b, a * a, b * b))
    telling = np.maximum(squares_a, squares_b) > _DETAIL**2 * _BLOCK**2
    if telling.sum() < _LEAST_BLOCKS or covered.mean() < 0.7:
        return -1.0
    floor = _DETAIL**2 / 4 * _BLOCK**2  # rounding and noise must not decide a faint block
    correlations = (products + floor) / np.sqrt((squares_a + floor) * (squares_b + floor))
    return float(np.quantile(correlations[telling], 0.25))


def _details(picture: np.ndarray) -> np.ndarray:
    """What is finer than some pixels and coarser than one: float32, of the same shape."""
    picture = picture.astype(np.float32)
    return cv2.GaussianBlur(picture, (0, 0), 0.8) - cv2.GaussianBlur(picture, (0, 0), 2.5)


def _even(picture: np.ndarray) -> np.ndarray:
    """Contrast made alike everywhere, lest a white caption outweigh the picture: float32."""
    picture = picture.astype(np.float32)
    picture -= cv2.GaussianBlur(picture, (0, 0), 4)
    return picture / np.sqrt(cv2.GaussianBlur(picture**2, (0, 0), 4) + 4)


def _block_sums(values: np.ndarray) -> np.ndarray:
    return values.reshape(SIDE // _BLOCK, _BLOCK, SIDE // _BLOCK, _BLOCK).sum((1, 3))


def _blocks(details: np.ndarray) -> int:
    """How many blocks have detail."""
    return int((_block_sums(details**2) > _DETAIL**2 * _BLOCK**2).sum())

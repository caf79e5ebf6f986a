"""Augmentation as a pure function of (seed, epoch, index), and the normalisation after it.

Random numbers come from Philox4x32-10 with key = seed and counter = (draw, index, epoch, 0):
the generator Triton has, so that a GPU kernel calling `tl.philox(seed, draw, index, epoch, 0)`
sees the same numbers. (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
SC 2011.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from train.data.operations import erase, operate

# Batches are prepared by threads of the loader; OpenCV's own threads would only fight with them.
cv2.setNumThreads(1)

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)

# Which four numbers of the generator decide what.
CROP, TURN, COLOUR, ORDER, OPERATE, ERASE, PLACE, SAMPLE = range(8)

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True)
class Strength:
    """How far an augmentation may go.

    area     least share of the square that a crop keeps
    ratio    most width / height of a crop, and the least by its inverse
    degrees  rotation either way
    colour   brightness, contrast and saturation factors lie in 1 - colour .. 1 + colour
    """

    area: float
    ratio: float
    degrees: float
    colour: float


STRENGTHS = {
    "light": Strength(area=0.7, ratio=1.1, degrees=0, colour=0),
    "strong": Strength(area=0.35, ratio=4 / 3, degrees=15, colour=0.3),
    "heavy": Strength(area=0.25, ratio=4 / 3, degrees=20, colour=0.4),
}
HEAVY = "heavy"  # goes on with `operations`, of which the kernels know none
AUGMENTS = ("none", *STRENGTHS)


def philox4x32(counter: Sequence, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of four broadcastable uint32 counters: uint32 [4, ...]."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in np.broadcast_arrays(*counter))
    k0, k1 = (np.uint64(k) for k in key)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ k0, b & low, (a >> shift) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def philox(seed: int, draw, index, epoch) -> np.ndarray:
    """Four random words for each (draw, index, epoch), any of them arrays: uint32 [4, ...]. As a
    counter has 32 bits, so many of the index count."""
    index = np.asarray(index, dtype=np.uint64) & np.uint64(0xFFFFFFFF)
    return philox4x32((draw, index, epoch, 0), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))


def uniform(seed: int, draw, index, epoch) -> np.ndarray:
    """As `philox`, as float32 in [0, 1): bit-equal to Triton's `uint_to_uniform_float`."""
    words = philox(seed, draw, index, epoch).view(np.int32)
    return np.where(words < 0, ~words, words).astype(np.float32) * np.float32(4.6566127342e-10)


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 .. n-1 for (seed, epoch), int64 [n]: the order of random 64-bit keys."""
    words = philox(seed, ORDER, np.arange(n), epoch).astype(np.uint64)
    return np.argsort((words[0] << np.uint64(32)) | words[1], kind="stable")


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """As many positions in `labels` (int [n]) as it has, each class equally often: int64 [n].

    Where n is no multiple of the classes, some come once more, others in the next epoch. Within a
    class positions are drawn with replacement; the classes come in the order of `order`.
    """
    present = np.unique(labels)
    turns = (order(len(labels), seed, epoch) + epoch) % len(present)
    words = philox(seed, SAMPLE, np.arange(len(labels)), epoch)[0].astype(np.uint64)
    chosen = np.empty(len(labels), dtype=np.int64)
    for turn, label in enumerate(present):
        own, here = np.flatnonzero(labels == label), turns == turn
        chosen[here] = own[words[here] * np.uint64(len(own)) >> np.uint64(32)]
    return chosen


def augment_batch(
    images: np.ndarray | Sequence[np.ndarray],
    indices: np.ndarray,
    epoch: int,
    seed: int,
    kind: str,
    image_size: int,
) -> np.ndarray:
    """One epoch's view of each image: uint8 [B, image_size, image_size, 3].

    images: uint8 [B, S, S, 3], or B arrays [S, S, 3]. indices: int [B], the photos' numbers, which
    with `epoch` and `seed` decide everything random. kind: one of AUGMENTS; `none` is the image
    itself, antialiased down to image_size where S is larger.
    """
    out = np.empty((len(images), image_size, image_size, 3), np.uint8)
    if kind == "none":
        for image, view in zip(images, out, strict=True):
            if len(image) == image_size:
                view[:] = image
            else:
                cv2.resize(image, (image_size, image_size), view, interpolation=cv2.INTER_AREA)
        return out
    strength, indices = STRENGTHS[kind], np.asarray(indices)
    views = _views(strength, indices, epoch, seed, len(images[0]), image_size)
    factors = _colour_factors(strength, indices, epoch, seed)
    if kind == HEAVY:
        draws = [uniform(seed, draw, indices, epoch) for draw in (OPERATE, ERASE, PLACE)]
        draws = np.concatenate(draws).T.astype(np.float64)  # [B, 12]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (image_size, image_size)
    for i, (image, view) in enumerate(zip(images, out, strict=True)):
        cv2.warpAffine(image, views[i], size, view, flags, cv2.BORDER_REFLECT_101)
        if strength.colour:
            cv2.transform(view.copy(), _colour_matrix(view, *factors[i]), view)
        if kind == HEAVY:
            view[:] = operate(view, draws[i, :4])
            erase(view, draws[i, 4:7], draws[i, 8:10])
    return out


def _views(
    strength: Strength, indices: np.ndarray, epoch: int, seed: int, store: int, size: int
) -> np.ndarray:
    """Maps from output to stored pixels, float64 [B, 2, 3]: crop, flip and rotation in one."""
    u_area, u_ratio, u_x, u_y = uniform(seed, CROP, indices, epoch).astype(np.float64)
    u_flip, u_turn, _, _ = uniform(seed, TURN, indices, epoch).astype(np.float64)
    area = strength.area + (1 - strength.area) * u_area
    root = np.sqrt(strength.ratio) ** (2 * u_ratio - 1)  # square root of width / height
    width = np.minimum(np.sqrt(area) * root, 1)  # shares of the square
    height = np.minimum(np.sqrt(area) / root, 1)
    centre = store * np.stack([0.5 + (1 - width) * (u_x - 0.5), 0.5 + (1 - height) * (u_y - 0.5)])
    angle = np.deg2rad(strength.degrees) * (2 * u_turn - 1)
    across = width * np.where(u_flip < 0.5, -1, 1) * store / size
    down = height * store / size
    linear = np.array(
        [
            [across * np.cos(angle), -down * np.sin(angle)],
            [across * np.sin(angle), down * np.cos(angle)],
        ]
    )
    # Pixel i covers i .. i+1: its centre is i + 1/2 on both sides of the map.
    offset = centre - linear.sum(axis=1) * (size / 2 - 0.5) - 0.5
    return np.concatenate([linear, offset[:, None]], axis=1).transpose(2, 0, 1)


def _colour_factors(strength: Strength, indices: np.ndarray, epoch: int, seed: int) -> np.ndarray:
    """Brightness, contrast and saturation factors, float64 [B, 3]."""
    draws = uniform(seed, COLOUR, indices, epoch)[:3].astype(np.float64)
    return 1 + strength.colour * (2 * draws.T - 1)


def _colour_matrix(
    image: np.ndarray, brightness: float, contrast: float, saturation: float
) -> np.ndarray:
    """One affine map of RGB, float64 [3, 4]: brightness, then contrast around the picture's mean
    grey, then saturation around each pixel's own grey."""
    matrix = np.empty((3, 4))
    matrix[:, :3] = (
        brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * _GREY[None, :])
    )
    matrix[:, 3] = (1 - contrast) * brightness * (_GREY @ cv2.mean(image)[:3])
    return matrix


def cutmix(
    size: int, alpha: float, *, seed: int, epoch: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """What batch number `batch` of `size` images pastes: (box, permutation int64 [size]).

    box: float32 [4], top, left, bottom, right in 0..1; within it, the same for all images, the
    pixels are those of the permutation. It has an area of 1 - lam before it is cut to the picture,
    lam from Beta(alpha, alpha), and its centre anywhere. (Yun et al.: "CutMix", ICCV 2019.)
    """
    generator = np.random.default_rng((seed, epoch, batch, 1))
    reach = np.sqrt(1 - generator.beta(alpha, alpha)) / 2
    centre = generator.random(2)
    box = np.concatenate([centre - reach, centre + reach]).clip(0, 1)
    return box.astype(np.float32), generator.permutation(size)


def mixup(
    size: int, alpha: float, *, seed: int, epoch: int, batch: int
) -> tuple[float, np.ndarray]:
    """How batch number `batch` of `size` images is mixed: (lam, permutation int64 [size]).

    Inputs and losses become lam * own + (1 - lam) * those of the permutation, lam from
    Beta(alpha, alpha); alpha = 0 mixes nothing. (Zhang et al.: "mixup", ICLR 2018.)
    """
    if alpha == 0:
        return 1.0, np.arange(size)
    generator = np.random.default_rng((seed, epoch, batch))
    return float(generator.beta(alpha, alpha)), generator.permutation(size)

"""What `--augment heavy` does to a view after its crop, flip, rotation and colours: two operations
drawn from OPERATIONS, then sometimes a hole.

The operations are those of RandAugment (Cubuk, Zoph, Shlens, Le, 2019) that the affine map and the
colour matrix of every view do not cover already; each has a strength of its own, drawn evenly.
The hole is random erasing (Zhong, Zheng, Kang, Li, Yang, 2017) filled with the mean of ImageNet,
which normalisation turns into zeros.

Pictures are uint8 [H, W, 3]; strength is in [0, 1).
"""

import cv2
import numpy as np

ERASED = 0.25  # of the pictures
HOLE = (0.02, 1 / 3)  # area, as a share of the picture
TALL = 3.3  # most height / width of a hole, and the least by its inverse
SHEAR = 0.3
FILL = (124, 116, 104)  # MEAN in levels of 0..255
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's SMOOTH


def identity(image: np.ndarray, strength: float) -> np.ndarray:
    return image


def autocontrast(image: np.ndarray, strength: float) -> np.ndarray:
    """Each channel stretched to 0..255."""
    low, high = np.array([cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]).T
    scale = np.where(high > low, 255 / np.maximum(high - low, 1), 1)
    shift = np.where(high > low, -low * scale, 0)
    table = np.clip(np.arange(256)[:, None] * scale + shift, 0, 255)
    return cv2.LUT(image, table.astype(np.uint8)[None])


def equalize(image: np.ndarray, strength: float) -> np.ndarray:
    """Each channel with all levels equally frequent, as nearly as whole levels allow."""
    table = np.empty((1, 256, 3), np.uint8)
    for channel in range(3):
        counts = np.bincount(image[:, :, channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        below = np.cumsum(counts) - counts
        table[0, :, channel] = (
            np.minimum((below + step // 2) // step, 255) if step else np.arange(256)
        )
    return cv2.LUT(image, table)


def solarize(image: np.ndarray, strength: float) -> np.ndarray:
    """Levels from 256 - 128 strength on inverted: more would leave nothing of a dish's colours."""
    levels = np.arange(256)
    table = np.where(levels < 256 - 128 * strength, levels, 255 - levels)
    return cv2.LUT(image, table.astype(np.uint8))


def posterize(image: np.ndarray, strength: float) -> np.ndarray:
    """The lowest 0 to 4 bits of every level cleared."""
    return image & np.uint8(0xFF << int(5 * strength) & 0xFF)


def sharpness(image: np.ndarray, strength: float) -> np.ndarray:
    """From almost smoothed (0) over the picture itself (1/2) to sharpened (1)."""
    factor = 0.1 + 1.8 * strength
    return cv2.addWeighted(image, factor, cv2.filter2D(image, -1, _SMOOTH), 1 - factor, 0)


def shear_x(image: np.ndarray, strength: float) -> np.ndarray:
    return _sheared(image, SHEAR * (2 * strength - 1), 0)


def shear_y(image: np.ndarray, strength: float) -> np.ndarray:
    return _sheared(image, 0, SHEAR * (2 * strength - 1))


OPERATIONS = (
    identity,
    autocontrast,
    equalize,
    solarize,
    posterize,
    sharpness,
    shear_x,
    shear_y,
)


def operate(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Two operations one after the other; draws: which and how strong, twice, in [0, 1)."""
    for which, strength in draws.reshape(2, 2):
        image = OPERATIONS[int(which * len(OPERATIONS))](image, float(strength))
    return image


def erase(image: np.ndarray, shape: np.ndarray, place: np.ndarray) -> None:
    """Fill a rectangle of `image` itself, or none; in [0, 1) each, shape: whether, area and
    height / width; place: left, top."""
    (whether, u_area, u_tall), (u_left, u_top) = shape, place
    if whether >= ERASED:
        return
    rows, columns = image.shape[:2]
    area = (HOLE[0] + (HOLE[1] - HOLE[0]) * u_area) * rows * columns
    root = np.sqrt(TALL) ** (2 * u_tall - 1)  # square root of height / width
    height = min(round(np.sqrt(area) * root), rows)
    width = min(round(np.sqrt(area) / root), columns)
    top = int(u_top * (rows - height + 1))
    left = int(u_left * (columns - width + 1))
    image[top : top + height, left : left + width] = FILL


def _sheared(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """The picture sheared about its centre; what lies outside is mirrored."""
    rows, columns = image.shape[:2]
    matrix = np.array(
        [[1, x, -x * (rows - 1) / 2], [y, 1, -y * (columns - 1) / 2]], dtype=np.float64
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (columns, rows), None, flags, cv2.BORDER_REFLECT_101)

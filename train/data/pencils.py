"""Pencils the drawn dishes share: ellipses, lines and noise with sub-pixel edges, in RGB."""

from dataclasses import dataclass

import cv2
import numpy as np

SIZE = 224  # px, the drawings' side

_SHIFT = 4  # OpenCV's fixed point: coordinates in sixteenths of a pixel
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Plate:
    """The ellipse food lies in: centre, half axes in pixels, rotation in degrees."""

    x: float
    y: float
    a: float
    b: float
    angle: float

    def at(self, u, v) -> np.ndarray:
        """Pixels of points of the unit disc: float [..., 2]."""
        turn = np.deg2rad(self.angle)
        du, dv = np.asarray(u) * self.a, np.asarray(v) * self.b
        return np.stack(
            [
                self.x + du * np.cos(turn) - dv * np.sin(turn),
                self.y + du * np.sin(turn) + dv * np.cos(turn),
            ],
            axis=-1,
        )

    def scatter(self, rng: np.random.Generator, n: int, reach: float = 1.0) -> np.ndarray:
        """`n` random points within `reach` of the centre: float [n, 2], in pixels."""
        radius, turn = reach * np.sqrt(rng.random(n)), rng.random(n) * 2 * np.pi
        return self.at(radius * np.cos(turn), radius * np.sin(turn))


def _fixed(points) -> np.ndarray:
    return np.round(np.asarray(points) * (1 << _SHIFT)).astype(np.int32)


def ellipse(image, centre, axes, angle: float, colour: Colour, width: int = -1) -> None:
    # without NumPy: thousands of these are drawn, and its calls cost more than the drawing
    (x, y), (a, b) = centre, axes
    unit = 1 << _SHIFT
    middle = (round(float(x) * unit), round(float(y) * unit))
    half = (max(round(float(a) * unit), 1), max(round(float(b) * unit), 1))
    cv2.ellipse(image, middle, half, angle, 0, 360, colour, width, cv2.LINE_AA, _SHIFT)


def polygon(image, points, colour: Colour) -> None:
    cv2.fillPoly(image, [_fixed(points)], colour, cv2.LINE_AA, _SHIFT)


def lines(image, paths, colour: Colour, width: int, closed: bool = False) -> None:
    """paths: [N, points, 2] in pixels, all of one colour."""
    cv2.polylines(image, list(_fixed(paths)), closed, colour, width, cv2.LINE_AA, _SHIFT)


def near(rng, colour, spread: float = 12) -> Colour:
    """A colour near `colour`."""
    shade = rng.normal(0, spread) + rng.normal(0, spread / 2, 3)
    return tuple(float(c) for c in np.clip(np.asarray(colour) + shade, 0, 255))


def mix(a, b, share: float) -> Colour:
    return tuple(float(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def pick(rng, *options):
    return options[rng.integers(len(options))]


def clouds(rng, cells: int, amount: float) -> np.ndarray:
    """Smooth grey noise of about +-amount: float32 [SIZE, SIZE, 1]."""
    coarse = rng.normal(0, amount, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)[..., None]


def shade(image: np.ndarray, added: np.ndarray, mask: np.ndarray | None = None) -> None:
    """Adds grey levels, float32 [SIZE, SIZE, 1], where the mask is set."""
    if mask is not None:
        added = added * (mask[..., None] > 0)
    cv2.add(image, cv2.merge([added[..., 0]] * 3), image, dtype=cv2.CV_8U)


def strands(rng, starts: np.ndarray, length: float, bend: float, turn=None) -> np.ndarray:
    """Wavy lines from `starts` [n, 2]: float [n, 7, 2]."""
    n, steps = len(starts), 6
    heading = rng.random((n, 1)) * 2 * np.pi if turn is None else turn + rng.normal(0, 0.25, (n, 1))
    heading = heading + np.cumsum(rng.normal(0, bend, (n, steps)), axis=1)
    step = np.stack([np.cos(heading), np.sin(heading)], axis=-1) * (length / steps)
    path = np.concatenate([np.zeros((n, 1, 2)), np.cumsum(step, axis=1)], axis=1)
    return starts[:, None] + path - path.mean(axis=1, keepdims=True)


def leaf(rng, image, point, size: float) -> None:
    green = near(rng, (70, 130, 45), 15)
    for turn in rng.uniform(0, 360) + np.array([0, 115, 240]):
        away = size * 0.6 * np.array([np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))])
        ellipse(image, point + away, (size * 0.62, size * 0.34), turn, green)
        green = mix(green, (150, 190, 90), 0.2)


def lime(rng, image, point, size: float) -> None:
    angle = rng.uniform(0, 180)
    ellipse(image, point, (size, size * 0.9), angle, near(rng, (75, 130, 45)))
    ellipse(image, point, (size * 0.86, size * 0.77), angle, (225, 232, 190))
    flesh = near(rng, (180, 205, 105))
    for turn in np.arange(0, 360, 45) + angle:
        middle = np.asarray(point) + size * 0.45 * np.array(
            [np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))]
        )
        ellipse(image, middle, (size * 0.34, size * 0.15), turn, flesh)


def egg(rng, image, point, size: float) -> None:
    """Half a boiled egg."""
    angle = rng.uniform(0, 360)
    toward = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])
    ellipse(image, np.asarray(point) + 2, (size, size * 0.76), angle, (85, 65, 40))
    ellipse(image, point, (size, size * 0.76), angle, (222, 214, 200))
    ellipse(image, point, (size * 0.92, size * 0.69), angle, (250, 247, 238))
    yolk = point + toward * size * 0.12
    ellipse(image, yolk, (size * 0.5, size * 0.46), angle, near(rng, (228, 160, 50)))
    ellipse(image, yolk - 1, (size * 0.36, size * 0.32), angle, near(rng, (242, 190, 80)))

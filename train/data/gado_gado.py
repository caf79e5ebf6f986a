"""Gado-gado: seven kinds of vegetable patches, and the peanut sauce over them."""

import numpy as np

from train.data.pencils import Plate, egg, ellipse, lines, mix, near, pick, polygon, strands


def gado_gado(rng, image, plate: Plate) -> None:
    drawn = image.copy()
    patches = [_greens, _long_beans, _sprouts, _tofu, _potato, _carrot, _cucumber]
    count = rng.integers(4, 7)
    kinds = [patches[i] for i in rng.permutation(len(patches))[:count]]
    first = rng.random() * 2 * np.pi
    for k, patch in enumerate(kinds):
        turn = first + 2 * np.pi * k / count
        reach = 0.6
        middle = plate.at(reach * np.cos(turn), reach * np.sin(turn))
        share = 0.62 * np.sin(np.pi / count) + 0.12
        patch(rng, drawn, Plate(*middle, plate.a * share, plate.b * share, np.rad2deg(turn)))
    if rng.random() < 0.6:
        egg(rng, drawn, plate.scatter(rng, 1, 0.55)[0], rng.uniform(0.18, 0.24) * plate.a)
    _peanut_sauce(rng, drawn, plate)
    if rng.random() < 0.5:  # crackers
        for _ in range(rng.integers(1, 4)):
            turn = rng.random() * 2 * np.pi
            point, size = plate.at(0.85 * np.cos(turn), 0.85 * np.sin(turn)), rng.uniform(11, 19)
            colour = near(rng, (238, 215, 165), 8)
            ellipse(
                drawn,
                point,
                (size, size * 0.8),
                rng.uniform(0, 180),
                mix(colour, (120, 80, 30), 0.35),
            )
            ellipse(drawn, point, (size * 0.92, size * 0.72), rng.uniform(0, 180), colour)
            for hole in point + rng.uniform(-0.5, 0.5, (6, 2)) * size:
                ellipse(drawn, hole, (2, 1.4), 0, mix(colour, (150, 105, 50), 0.4), 1)
    image[:] = drawn


def _peanut_sauce(rng, image, plate: Plate) -> None:
    """Thick strokes back and forth over the vegetables, and a pool in the middle."""
    colour = near(rng, pick(rng, (170, 110, 55), (150, 90, 45), (190, 135, 75)), 10)
    turn, sweeps = rng.random() * 2 * np.pi, rng.integers(3, 7)
    t = np.linspace(-1, 1, 16 * sweeps)
    u = rng.uniform(0.45, 0.65) * t + rng.normal(0, 0.02, t.size)
    v = rng.uniform(0.35, 0.6) * np.sqrt(1 - 0.6 * t**2) * np.sin(np.pi * sweeps * t) + rng.normal(
        0, 0.02, t.size
    )
    path = plate.at(u * np.cos(turn) - v * np.sin(turn), u * np.sin(turn) + v * np.cos(turn))
    width = int(rng.integers(4, 8))
    lines(image, path[None] + 1.5, mix(colour, (45, 22, 5), 0.6), width + 1)
    lines(image, path[None], colour, width)
    lines(image, path[None] - 1, mix(colour, (255, 225, 170), 0.3), max(1, width // 4))
    crumbs = path[rng.integers(0, len(path), 30)] + rng.normal(0, width / 3, (30, 2))
    for crumb in crumbs:
        ellipse(image, crumb, (1.5, 1.1), 0, mix(colour, (235, 200, 140), 0.6))


def _greens(rng, image, patch: Plate) -> None:
    for _ in range(16):
        point, angle = patch.scatter(rng, 1)[0], rng.uniform(0, 180)
        green = near(rng, (60, 115, 45), 18)
        ellipse(image, point, (rng.uniform(8, 14), rng.uniform(4, 7)), angle, green)
        away = 8 * np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])
        lines(image, [[point - away, point + away]], mix(green, (190, 220, 130), 0.4), 1)


def _long_beans(rng, image, patch: Plate) -> None:
    heading = rng.random() * np.pi
    for tone in (0.5, 0.2, 0):
        beans = strands(rng, patch.scatter(rng, 10, 0.9), patch.a * 1.1, 0.06, heading)
        lines(image, beans, mix(near(rng, (110, 160, 70)), (20, 45, 10), tone), 4)


def _sprouts(rng, image, patch: Plate) -> None:
    for tone in (0.4, 0.2, 0):
        sprouts = strands(rng, patch.scatter(rng, 20), 20, 0.45)
        lines(image, sprouts, mix((242, 238, 215), (120, 100, 50), tone), 2)


def _tofu(rng, image, patch: Plate) -> None:
    for point in patch.scatter(rng, 7, 0.9):
        colour, turn = near(rng, (205, 155, 85)), rng.random() * np.pi
        corners = turn + np.arange(4) * np.pi / 2
        outline = rng.uniform(8, 11) * np.stack([np.cos(corners), np.sin(corners)], -1)
        polygon(image, point + outline + 1.5, mix(colour, (60, 30, 5), 0.6))
        polygon(image, point + outline, colour)
        polygon(image, point + outline * 0.7, mix(colour, (255, 240, 205), 0.45))


def _potato(rng, image, patch: Plate) -> None:
    for point in patch.scatter(rng, 8, 0.9):
        colour, angle = near(rng, (225, 195, 110)), rng.uniform(0, 180)
        ellipse(image, point + 1.5, (9, 7), angle, mix(colour, (90, 60, 10), 0.5))
        ellipse(image, point, (9, 7), angle, colour)
        ellipse(image, point - 1, (6, 4.4), angle, mix(colour, (255, 245, 200), 0.4))


def _carrot(rng, image, patch: Plate) -> None:
    for point in patch.scatter(rng, 12, 0.9):
        colour = near(rng, (230, 120, 40))
        ellipse(image, point + 1, (7, 6), 0, mix(colour, (90, 35, 0), 0.5))
        ellipse(image, point, (7, 6), 0, colour)
        ellipse(image, point, (3, 2.6), 0, mix(colour, (255, 190, 110), 0.5))


def _cucumber(rng, image, patch: Plate) -> None:
    for point in patch.scatter(rng, 8, 0.9):
        ellipse(image, point, (10, 8.5), 0, near(rng, (60, 110, 50), 8))
        ellipse(image, point, (8.6, 7.2), 0, near(rng, (205, 222, 165), 6))
        ellipse(image, point, (4.4, 3.6), 0, (225, 235, 195))

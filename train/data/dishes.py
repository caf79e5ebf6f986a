"""The drawn dishes, each a function (rng, image, plate) that draws on the image."""

import cv2
import numpy as np

from train.data.gado_gado import gado_gado
from train.data.pencils import (
    SIZE,
    Colour,
    Plate,
    clouds,
    egg,
    ellipse,
    lines,
    mix,
    near,
    pick,
    polygon,
    shade,
    strands,
)


def _broth(rng, image, plate: Plate, colour: Colour, oil: Colour) -> None:
    """A surface of soup with drops of fat."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    centre = (plate.x, plate.y)
    ellipse(image, centre, (plate.a, plate.b), plate.angle, mix(colour, (0, 0, 0), 0.25))
    ellipse(image, centre, (plate.a * 0.96, plate.b * 0.96), plate.angle, colour)
    ellipse(mask, centre, (plate.a * 0.96, plate.b * 0.96), plate.angle, (255, 0, 0))
    shade(image, clouds(rng, 9, 10), mask)
    for point in plate.scatter(rng, rng.integers(15, 50), 0.92):
        size = rng.uniform(1.2, 4.5)
        ellipse(image, point, (size, size * plate.b / plate.a), plate.angle, oil, 1)


def _clip(image: np.ndarray, drawn: np.ndarray, plate: Plate) -> None:
    """Takes over from `drawn` what lies within the plate."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    ellipse(mask, (plate.x, plate.y), (plate.a * 0.97, plate.b * 0.97), plate.angle, (255, 0, 0))
    cv2.copyTo(drawn, mask, image)


def _ball(rng, image, point, size: float, colour: Colour) -> None:
    """A ball half under the surface, lit from above."""
    point = np.asarray(point)
    ellipse(
        image,
        point + np.array([1.5, 2.5]),
        (size * 1.05, size * 0.98),
        0,
        mix(colour, (30, 15, 5), 0.65),
    )
    for inset, light in ((1, -0.18), (0.9, 0), (0.68, 0.12), (0.42, 0.24)):
        shift = (1 - inset) * size * np.array([-0.45, -0.6])
        toward = (255, 250, 240) if light > 0 else (20, 10, 5)
        ellipse(
            image,
            point + shift,
            (size * inset, size * inset * 0.94),
            0,
            mix(colour, toward, abs(light)),
        )
    for spot in point + rng.uniform(-0.55, 0.55, (rng.integers(2, 6), 2)) * size:
        ellipse(image, spot, (1.2, 0.9), rng.uniform(0, 180), mix(colour, (40, 20, 10), 0.4))
    ellipse(
        image,
        point - size * np.array([0.32, 0.42]),
        (size * 0.16, size * 0.09),
        -35,
        (255, 252, 245),
    )


def _bakso(rng, image, plate: Plate) -> None:
    drawn = image.copy()
    colour = near(
        rng, pick(rng, (190, 150, 95), (165, 110, 65), (205, 180, 130), (175, 85, 45)), 14
    )
    _broth(rng, drawn, plate, colour, mix(colour, (255, 235, 170), 0.5))
    if rng.random() < 0.6:  # a nest of noodles on one side
        turn = rng.random() * 2 * np.pi
        nest = Plate(
            *plate.at(0.45 * np.cos(turn), 0.45 * np.sin(turn)), plate.a * 0.5, plate.b * 0.5, 0
        )
        base = near(rng, (225, 195, 110))
        for tone in (0.35, 0.15, 0):
            threads = strands(rng, nest.scatter(rng, 14, 0.9), nest.a * 1.3, 0.5)
            lines(drawn, threads, mix(base, (70, 40, 10), tone), 2)
    if rng.random() < 0.6:  # greens
        turn = rng.random() * 2 * np.pi
        for _ in range(rng.integers(2, 5)):
            point = plate.at(0.6 * np.cos(turn), 0.6 * np.sin(turn)) + rng.normal(0, 8, 2)
            green = near(rng, (75, 125, 50), 14)
            angle = rng.uniform(0, 180)
            ellipse(drawn, point, (rng.uniform(14, 22), rng.uniform(8, 12)), angle, green)
            away = 14 * np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])
            lines(drawn, [[point - away, point + away]], mix(green, (220, 235, 180), 0.6), 2)
    meat = near(rng, pick(rng, (150, 125, 105), (170, 145, 120), (130, 100, 80)), 10)
    wanted, size = rng.integers(3, 9), rng.uniform(0.17, 0.27) * plate.a
    placed: list[np.ndarray] = []
    for point in plate.scatter(rng, 60, 0.74):
        if all(np.hypot(*(point - other)) > 1.75 * size for other in placed):
            placed.append(point)
            if len(placed) == wanted:
                break
    for point in sorted(placed, key=lambda p: p[1]):
        _ball(rng, drawn, point, size * rng.uniform(0.88, 1.12), near(rng, meat, 6))
    _clip(image, drawn, plate)


def _soto_ayam(rng, image, plate: Plate) -> None:
    drawn = image.copy()
    colour = near(
        rng, pick(rng, (215, 170, 60), (225, 195, 110), (200, 150, 50), (220, 200, 150)), 14
    )
    _broth(rng, drawn, plate, colour, mix(colour, (255, 245, 190), 0.55))
    glass = near(rng, (235, 225, 200), 8)
    turn = rng.random() * 2 * np.pi
    tangle = Plate(
        *plate.at(0.2 * np.cos(turn), 0.2 * np.sin(turn)), plate.a * 0.75, plate.b * 0.75, 0
    )
    for tone in (0.3, 0.12, 0):  # glass noodles
        threads = strands(rng, tangle.scatter(rng, 22, 0.9), plate.a * 0.9, 0.75)
        lines(drawn, threads, mix(glass, colour, tone), 1)
    meat = near(rng, (230, 200, 155), 8)
    for _ in range(rng.integers(3, 6)):  # shredded chicken, in bundles
        point, heading = plate.scatter(rng, 1, 0.6)[0], rng.random() * np.pi
        for tone in (0.45, 0.2, 0):
            starts = point + rng.normal(0, 6, (9, 2))
            lines(
                drawn,
                strands(rng, starts, plate.a * 0.34, 0.15, heading),
                mix(meat, (120, 75, 35), tone),
                2,
            )
    for tone in (0.15, 0):  # bean sprouts
        sprouts = strands(rng, plate.scatter(rng, rng.integers(3, 14), 0.8), 16, 0.5)
        lines(drawn, sprouts, mix((245, 242, 225), colour, tone), 2)
        for head in sprouts[:, 0]:
            ellipse(drawn, head, (2.6, 2), 0, (225, 210, 120))
    for _ in range(rng.integers(0, 3)):  # tomato wedges
        point, angle = plate.scatter(rng, 1, 0.75)[0], rng.uniform(0, 360)
        ellipse(drawn, point, (10, 5), angle, near(rng, (190, 55, 35)))
        ellipse(drawn, point + 1, (7, 3), angle, near(rng, (225, 110, 75)))
    for _ in range(rng.integers(1, 4)):
        egg(rng, drawn, plate.scatter(rng, 1, 0.7)[0], rng.uniform(0.17, 0.25) * plate.a)
    _clip(image, drawn, plate)


def _nasi_goreng(rng, image, plate: Plate) -> None:
    rice = np.array(
        near(rng, pick(rng, (190, 135, 70), (165, 100, 50), (205, 160, 95), (180, 95, 50)), 12)
    )
    lobes = 1 + 0.05 * rng.normal(size=24)
    turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    polygon(
        image,
        plate.at(lobes * np.cos(turns), lobes * np.sin(turns)) + 2,
        mix(rice, (30, 15, 5), 0.7),
    )
    polygon(
        image, plate.at(lobes * np.cos(turns), lobes * np.sin(turns)), mix(rice, (60, 30, 10), 0.45)
    )
    length = rng.uniform(4.5, 6.5)
    for tone in (-0.4, -0.25, -0.1, 0.05, 0.18, 0.32):  # grains, the dark ones below
        starts = plate.scatter(rng, int(plate.a * plate.b * 0.025) + 20, 1.0 - 0.06 * (tone > 0))
        heading = rng.random(len(starts)) * np.pi
        half = np.stack([np.cos(heading), np.sin(heading)], -1) * length / 2
        grains = np.stack([starts - half, starts + half], axis=1)
        lines(image, grains, mix(rice, (255, 240, 205) if tone > 0 else (40, 18, 5), abs(tone)), 2)
    for colour, most in (((80, 140, 50), 16), ((225, 125, 40), 12), ((200, 160, 120), 8)):
        for point in plate.scatter(rng, rng.integers(0, most), 0.9):  # peas, carrot, shrimp
            size = rng.uniform(1.8, 3.4)
            ellipse(image, point + 0.8, (size, size * 0.8), 0, mix(colour, (20, 10, 0), 0.5))
            ellipse(image, point, (size, size * 0.8), 0, near(rng, colour))
    if rng.random() < 0.8:
        _fried_egg(rng, image, plate.scatter(rng, 1, 0.35)[0], rng.uniform(0.3, 0.46) * plate.a)
    if rng.random() < 0.6:  # cucumber or tomato at the edge
        inside, peel = pick(rng, ((205, 222, 165), (70, 120, 55)), ((225, 95, 65), (180, 45, 30)))
        turn = rng.random() * 2 * np.pi
        for k in range(rng.integers(2, 5)):
            point = plate.at(0.95 * np.cos(turn + 0.28 * k), 0.95 * np.sin(turn + 0.28 * k))
            ellipse(image, point, (12, 10), 0, peel)
            ellipse(image, point, (10.3, 8.4), 0, near(rng, inside, 6))
            ellipse(image, point, (5, 4), 0, mix(inside, (255, 250, 220), 0.4), 1)


def _fried_egg(rng, image, point, size: float) -> None:
    turns = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    wave = sum(rng.normal(0, 0.09) * np.cos(k * turns + rng.uniform(0, 6.3)) for k in (2, 3, 5))
    outline = np.stack([np.cos(turns), np.sin(turns)], -1) * (1 + wave)[:, None]
    for scale, colour in ((1.05, (150, 95, 40)), (1.0, (215, 175, 110)), (0.93, (246, 243, 232))):
        polygon(image, point + outline * size * scale, near(rng, colour, 4))
    yolk = point + rng.uniform(-0.22, 0.22, 2) * size
    colour = near(rng, (236, 160, 35), 8)
    ellipse(image, yolk + 1, (size * 0.4, size * 0.38), 0, mix(colour, (110, 60, 0), 0.4))
    ellipse(image, yolk, (size * 0.39, size * 0.37), 0, colour)
    ellipse(image, yolk - size * 0.12, (size * 0.12, size * 0.07), -35, (255, 238, 190))


def _rendang(rng, image, plate: Plate) -> None:
    dark = np.array(
        near(rng, pick(rng, (85, 48, 28), (110, 60, 30), (70, 42, 30), (135, 75, 38)), 8)
    )
    meat = plate
    if rng.random() < 0.45:  # beside white rice
        turn = rng.random() * 2 * np.pi
        rice = Plate(
            *plate.at(-0.55 * np.cos(turn), -0.55 * np.sin(turn)), plate.a * 0.55, plate.b * 0.55, 0
        )
        ellipse(image, (rice.x, rice.y), (rice.a, rice.b), 0, (205, 198, 185))
        for colour in ((225, 220, 208), (245, 243, 236)):
            starts = rice.scatter(rng, 130, 0.95)
            lines(image, strands(rng, starts, 5, 0.1)[:, ::6], colour, 2)
        meat = Plate(
            *plate.at(0.3 * np.cos(turn), 0.3 * np.sin(turn)), plate.a * 0.75, plate.b * 0.75, 0
        )
    turns = np.linspace(0, 2 * np.pi, 30, endpoint=False)
    edge = 0.95 + 0.06 * rng.normal(size=30)
    sauce = mix(dark, (175, 100, 45), rng.uniform(0.25, 0.6))
    polygon(image, meat.at(edge * np.cos(turns), edge * np.sin(turns)), sauce)
    for tone in (-0.35, 0.25, 0.45):  # grated coconut and spice
        starts = meat.scatter(rng, 110, 0.95)
        crumbs = strands(rng, starts, 3, 0.5)[:, ::3]
        lines(image, crumbs, mix(sauce, (225, 160, 85) if tone > 0 else (20, 8, 4), abs(tone)), 1)
    size = rng.uniform(0.24, 0.36) * plate.a
    for point in sorted(meat.scatter(rng, rng.integers(5, 12), 0.68), key=lambda p: p[1]):
        _chunk(rng, image, point, size * rng.uniform(0.75, 1.2), near(rng, dark, 7))


def _chunk(rng, image, point, size: float, colour: Colour) -> None:
    """A rough piece of meat with fibres along it and a greasy shine."""
    corners = rng.integers(6, 10)
    turns = np.sort(rng.random(corners) * 0.5 + np.arange(corners)) * 2 * np.pi / corners
    heading = rng.random() * np.pi
    along = np.array([np.cos(heading), np.sin(heading)])
    across = np.array([-along[1], along[0]])
    reach = size * rng.uniform(0.8, 1.1, (corners, 1))
    outline = reach * (
        np.cos(turns)[:, None] * along * 1.15 + np.sin(turns)[:, None] * across * 0.8
    )
    polygon(image, point + outline * 1.08 + np.array([2, 3]), mix(colour, (10, 4, 2), 0.7))
    polygon(image, point + outline, colour)
    polygon(image, point + outline * 0.72 - size * 0.1, mix(colour, (190, 120, 70), 0.22))
    for share, light in ((0.4, -1), (0.35, 1)):
        starts = (
            point
            + rng.uniform(-0.55, 0.55, (7, 1)) * size * along
            + rng.uniform(-0.45, 0.45, (7, 1)) * size * across
        )
        fibres = strands(rng, starts, size * 0.5, 0.12, heading)
        lines(image, fibres, mix(colour, (215, 150, 95) if light > 0 else (15, 6, 3), share), 1)
    for glint in point + rng.uniform(-0.4, 0.2, (3, 2)) * size:
        ellipse(image, glint, (2.2, 1.1), np.rad2deg(heading), mix(colour, (255, 235, 205), 0.7))


DISHES = {
    "bakso": _bakso,
    "gado_gado": gado_gado,
    "nasi_goreng": _nasi_goreng,
    "rendang": _rendang,
    "soto_ayam": _soto_ayam,
}

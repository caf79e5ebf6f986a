"""`synthetic`: five dishes drawn by rule, so that a training runs without a single photo.

bakso         meatballs in a clear broth, with noodles and greens
gado_gado     a wheel of vegetable patches under strokes of peanut sauce
nasi_goreng   a mound of fried rice grains, mostly under a fried egg
rendang       rough dark chunks in a grainy sauce, beside some rice
soto_ayam     a soup of thin noodles, egg halves, shredded chicken and sprouts

Table, crockery, light, colour cast, position, size, rotation, garnish and clutter vary within every
class far more than its colours differ from the others', so a picture's mean colour tells little and
shape, arrangement and texture tell the class. A drawing depends on (seed, dish, number) alone.
"""

import hashlib
import threading
from functools import partial

import cv2
import numpy as np
from PIL import Image

from train.data.dishes import DISHES
from train.data.pencils import (
    SIZE,
    Plate,
    clouds,
    ellipse,
    leaf,
    lime,
    lines,
    mix,
    near,
    pick,
    polygon,
    shade,
    strands,
)
from train.data.photos import Photos, choose_classes

NAME = "synthetic"
PER_CLASS = 200
_PEN = threading.Lock()  # drawing is Python code: two threads at it slow each other down
DRAWING = 1  # raise it when a change alters pixels: cached drawings are then drawn anew


def accepts(data: str) -> bool:
    return data == NAME


def open_source(data: str, *, classes: tuple[str, ...] = (), seed: int = 0) -> Photos:
    """1,000 drawings, 200 of each dish (or of `classes`)."""
    chosen = choose_classes(DISHES, classes, NAME)
    files = tuple(f"{dish}/{number:04}.png" for dish in chosen for number in range(PER_CLASS))
    digests = (hashlib.sha256(f"{DRAWING} {seed} {file}".encode()).hexdigest() for file in files)
    return Photos(
        name=NAME,
        classes=tuple(chosen),
        files=files,
        labels=np.repeat(np.arange(len(chosen)), PER_CLASS),
        digests=tuple(digests),
        excluded=(),
        load=partial(_load, seed),
    )


def _load(seed: int, file: str, shorter: int | None = None) -> Image.Image:
    dish, number = file.removesuffix(".png").split("/")
    with _PEN:
        return Image.fromarray(draw(seed, dish, int(number)))


def draw(seed: int, dish: str, number: int) -> np.ndarray:
    """One picture: uint8 [SIZE, SIZE, 3], RGB."""
    rng = np.random.default_rng((seed, sorted(DISHES).index(dish), number))
    image = _table(rng)
    _clutter(rng, image)
    plate = _plate(rng, image, bowl=dish in ("bakso", "soto_ayam"))
    DISHES[dish](rng, image, plate)
    _garnish(rng, image, plate)
    return _photograph(rng, image)


def _table(rng) -> np.ndarray:
    """A table: plain, planks, checked cloth or a batik of rings."""
    base = np.array(
        pick(
            rng,
            (150, 105, 70),
            (95, 65, 45),
            (205, 190, 165),
            (90, 100, 110),
            (225, 222, 215),
            (60, 110, 90),
            (150, 60, 55),
            (60, 80, 130),
            (215, 170, 90),
        )
    )
    base = np.array(near(rng, base, 18))
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    image[:] = base
    second = near(rng, mix(base, pick(rng, (255, 250, 240), (25, 20, 20)), 0.35), 10)
    turn, pattern = rng.random() * np.pi, rng.integers(4)
    along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    middle, reach = np.array([SIZE / 2, SIZE / 2]), SIZE * 0.75
    if pattern == 1:  # planks
        grain = cv2.resize(rng.normal(0, 9, (64, 5)).astype(np.float32), (SIZE * 2, SIZE * 2))
        rotation = cv2.getRotationMatrix2D((SIZE, SIZE), np.rad2deg(turn), 1)
        rotation[:, 2] -= SIZE / 2
        shade(image, cv2.warpAffine(grain, rotation, (SIZE, SIZE))[..., None])
        offsets = np.arange(-reach, reach, rng.uniform(28, 60))
        ends = middle + offsets[:, None] * across
        lines(
            image, np.stack([ends - reach * 1.5 * along, ends + reach * 1.5 * along], 1), second, 1
        )
    elif pattern == 2:  # checked cloth
        pitch = rng.uniform(14, 36)
        offsets = np.arange(-reach, reach, pitch)
        for one, other in ((along, across), (across, along)):
            layer = image.copy()
            ends = middle + offsets[:, None] * other
            lines(
                layer,
                np.stack([ends - reach * 1.5 * one, ends + reach * 1.5 * one], 1),
                second,
                int(pitch / 2),
            )
            cv2.addWeighted(image, 0.5, layer, 0.5, 0, image)
    elif pattern == 3:  # batik
        pitch = rng.uniform(22, 44)
        radius = pitch * rng.uniform(0.25, 0.45)
        for i in np.arange(-reach, reach, pitch):
            for j in np.arange(-reach, reach, pitch):
                x, y = middle + i * along + j * across
                if -pitch < x < SIZE + pitch and -pitch < y < SIZE + pitch:
                    ellipse(image, (x, y), (radius, radius * 0.6), np.rad2deg(turn), second, 1)
                    ellipse(image, (x, y), (radius * 0.4,) * 2, 0, second)
    shade(image, clouds(rng, 40, 5) + clouds(rng, 5, 9))
    return image


def _clutter(rng, image) -> None:
    """Up to three things that lie about on any table."""
    for _ in range(rng.integers(4)):
        turn, reach = rng.random() * 2 * np.pi, rng.uniform(0.5, 0.72) * SIZE
        x, y = SIZE / 2 + reach * np.cos(turn), SIZE / 2 + reach * np.sin(turn)
        along = np.array([np.cos(turn + 1.4), np.sin(turn + 1.4)])
        thing = rng.integers(5)
        if thing == 0:  # spoon
            metal = near(rng, (190, 190, 195))
            lines(image, [[(x, y), np.array([x, y]) + along * 110]], mix(metal, (0, 0, 0), 0.3), 7)
            lines(image, [[(x, y), np.array([x, y]) + along * 110]], metal, 4)
            ellipse(image, (x, y), (20, 13), np.rad2deg(turn + 1.4), metal)
            ellipse(
                image, (x - 2, y - 2), (14, 8), np.rad2deg(turn + 1.4), mix(metal, (255,) * 3, 0.5)
            )
        elif thing == 1:  # a glass, a saucer of sambal or of peanuts
            radius, fill = (
                rng.uniform(22, 40),
                pick(rng, (150, 40, 25), (165, 110, 60), (170, 120, 50), (110, 140, 60)),
            )
            ellipse(image, (x + 4, y + 5), (radius, radius), 0, (40, 36, 34))
            ellipse(image, (x, y), (radius, radius), 0, near(rng, (225, 225, 220)))
            ellipse(image, (x, y), (radius * 0.8,) * 2, 0, near(rng, fill))
            ellipse(
                image,
                (x - radius * 0.25, y - radius * 0.3),
                (radius * 0.2, radius * 0.1),
                30,
                (250, 245, 235),
            )
        elif thing == 2:  # napkin
            colour = near(rng, pick(rng, (235, 230, 225), (180, 60, 60), (70, 110, 150)))
            other = np.array([-along[1], along[0]]) * 45
            corner = np.array([x, y])
            polygon(
                image,
                [corner, corner + along * 70, corner + along * 70 + other, corner + other],
                colour,
            )
            lines(
                image,
                [[corner + along * 35, corner + along * 35 + other]],
                mix(colour, (0, 0, 0), 0.2),
                1,
            )
        elif thing == 3:  # lime
            lime(rng, image, (x, y), rng.uniform(12, 20))
        else:  # chopsticks
            colour = near(rng, pick(rng, (120, 70, 40), (200, 160, 110), (40, 30, 30)))
            shift = np.array([-along[1], along[0]]) * 8
            ends = np.array([x, y]) + np.array([-1, 1])[:, None] * along * 90
            lines(image, [ends, ends + shift], colour, 4)


def _plate(rng, image, bowl: bool) -> Plate:
    """Crockery, or a banana leaf for dry food; returns where its food goes."""
    radius = rng.uniform(76, 110)
    x, y = SIZE / 2 + rng.uniform(-22, 22, 2)
    squash, angle = rng.uniform(0.76, 1.0), rng.uniform(-20, 20)
    light = rng.random() * 2 * np.pi
    shadow = np.zeros((56, 56), np.uint8)
    reach = rng.uniform(3, 9)
    ellipse(
        shadow,
        ((x + reach * np.cos(light)) / 4, (y + reach * np.sin(light)) / 4),
        (radius * 1.03 / 4, radius * squash * 1.03 / 4),
        angle,
        (110, 0, 0),
    )
    shadow = cv2.resize(cv2.GaussianBlur(shadow, (0, 0), 1.5), (SIZE, SIZE))
    cv2.subtract(image, cv2.merge([shadow] * 3), image)
    china = near(
        rng,
        pick(
            rng,
            (240, 238, 232),
            (240, 238, 232),
            (215, 200, 170),
            (75, 105, 140),
            (160, 85, 60),
            (55, 55, 58),
            (110, 140, 110),
        ),
        10,
    )
    a, b = radius, radius * squash
    if not bowl and rng.random() < 0.2:  # leaf
        green = near(rng, (60, 115, 50))
        rim = Plate(x, y, a * 1.1, b, angle)
        turns = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        edge = 1 + 0.03 * np.sin(5 * turns + rng.uniform(0, 6)) + 0.02 * rng.normal(size=40)
        polygon(image, rim.at(edge * np.cos(turns), edge * np.sin(turns)), green)
        ribs = np.linspace(-0.9, 0.9, 17)
        half = 0.95 * np.sqrt(1 - ribs**2)
        across = np.stack([rim.at(ribs, -half), rim.at(ribs, half)], axis=1)
        lines(image, across, mix(green, (0, 0, 0), 0.15), 1)
        lines(image, rim.at([-1, 1], [0, 0])[None], mix(green, (230, 240, 170), 0.4), 2)
    else:
        ellipse(image, (x, y), (a, b), angle, mix(china, (0, 0, 0), 0.18))
        ellipse(image, (x, y), (a - 1.5, b - 1.5), angle, china)
        if rng.random() < 0.35:
            band = near(rng, pick(rng, (40, 80, 150), (170, 50, 50), (40, 110, 70), (180, 140, 60)))
            ellipse(image, (x, y), (a * 0.95, b * 0.95), angle, band, 2)
        ellipse(
            image,
            (x, y),
            (a * 0.86, b * 0.86),
            angle,
            mix(china, (0, 0, 0), 0.14 if bowl else 0.07),
        )
        ellipse(image, (x + 1, y + 1.5), (a * 0.84, b * 0.84), angle, mix(china, (255,) * 3, 0.1))
    inner = 0.84 if bowl else rng.uniform(0.62, 0.84)
    return Plate(x, y, a * inner, b * inner, angle + rng.uniform(-180, 180) * (squash > 0.97))


def _garnish(rng, image, plate: Plate) -> None:
    """Fried shallots, leaves, chilli, lime: on any dish, or none of them."""
    if rng.random() < 0.5:
        for colour in ((120, 65, 25), (165, 105, 45)):
            flakes = strands(rng, plate.scatter(rng, rng.integers(6, 26), 0.7), 5, 0.7)
            lines(image, flakes, near(rng, colour), 1)
    if rng.random() < 0.5:
        for point in plate.scatter(rng, rng.integers(3, 14), 0.7):
            leaf(rng, image, point, rng.uniform(3, 7))
    if rng.random() < 0.3:
        for point in plate.scatter(rng, rng.integers(2, 7), 0.8):
            ellipse(image, point, (3, 2.4), rng.uniform(0, 180), near(rng, (190, 35, 25)), 2)
    if rng.random() < 0.2:
        lime(rng, image, plate.scatter(rng, 1, 0.9)[0], rng.uniform(9, 14))


def _photograph(rng, image) -> np.ndarray:
    """Light from one side, a colour cast, exposure, focus and grain."""
    tilt = 1 + rng.normal(0, 0.13, (2, 2, 1))
    cast = np.exp(rng.normal(0, 0.08, 3))
    exposure = np.exp(rng.normal(0.02, 0.16))
    light = cv2.resize((exposure * tilt * cast).astype(np.float32), (SIZE, SIZE))
    image = cv2.multiply(image, light, dtype=cv2.CV_8U)
    blur = rng.uniform(0, 1.1)
    if blur > 0.35:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    grain = rng.integers(-32, 33, (SIZE, SIZE, 1), dtype=np.int8)
    shade(image, grain * np.float32(rng.uniform(0.05, 0.25)))
    return image

"""The operations of heavy augmentation against Pillow's, the hole against its own description."""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tests.test_augment import photos
from train.data import operations
from train.data.augment import MEAN, STRENGTHS, augment_batch
from train.data.operations import FILL, OPERATIONS, SHEAR, erase, operate


@pytest.fixture(params=["smooth", "noise", "dark", "plain"])
def image(request) -> np.ndarray:
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return {
        "smooth": photos(1, 40)[0],
        "noise": noise,
        "dark": noise // 5 + np.array([10, 0, 60], np.uint8),
        "plain": np.full((40, 40, 3), (7, 200, 90), np.uint8),
    }[request.param]


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 0.81, 0.999])
def test_operations_are_those_of_pillow(image, strength):
    picture = Image.fromarray(image)
    expected = {
        "identity": picture,
        "autocontrast": ImageOps.autocontrast(picture),
        "equalize": ImageOps.equalize(picture),
        "solarize": ImageOps.solarize(picture, 256 - 128 * strength),
        "posterize": ImageOps.posterize(picture, 8 - int(5 * strength)),
    }
    for name, truth in expected.items():
        found = getattr(operations, name)(image, strength)
        assert np.array_equal(found, np.asarray(truth)), name
    sharp = np.asarray(ImageEnhance.Sharpness(picture).enhance(0.1 + 1.8 * strength)).astype(int)
    ours = operations.sharpness(image, strength)
    assert np.abs(ours - sharp)[1:-1, 1:-1].max() <= 1  # Pillow leaves the rim as it is
    assert [o.__name__ for o in OPERATIONS] == [*expected, "sharpness", "shear_x", "shear_y"]


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 0.9])
def test_shears_move_rows_or_columns_about_the_centre(strength):
    at = np.tile(np.arange(80), (80, 1)).astype(np.uint8)
    picture = np.stack([at, at.T, at], -1)
    y, x = np.mgrid[20:60, 20:60]
    slope = SHEAR * (2 * strength - 1)
    across = operations.shear_x(picture, strength)[20:60, 20:60].astype(float)
    down = operations.shear_y(picture, strength)[20:60, 20:60].astype(float)
    assert np.abs(across[..., 0] - (x + slope * (y - 39.5))).max() <= 0.55
    assert np.array_equal(across[..., 1], y)
    assert np.abs(down[..., 1] - (y + slope * (x - 39.5))).max() <= 0.55
    assert np.array_equal(down[..., 0], x)


def test_two_operations_follow_each_other():
    (picture,) = photos(1)
    found = operate(picture, np.array([3.5 / 8, 0.4, 4.5 / 8, 0.7]))
    assert np.array_equal(found, operations.posterize(operations.solarize(picture, 0.4), 0.7))
    assert np.array_equal(operate(picture, np.zeros(4)), picture)


def test_a_hole_is_one_rectangle_of_the_mean_colour_inside_the_picture():
    assert np.abs(np.array(FILL) - 255 * np.array(MEAN)).max() <= 0.5
    rng = np.random.default_rng(0)
    areas, ratios, touched = [], [], np.zeros((50, 50))
    for _ in range(2000):
        image = np.zeros((50, 50, 3), np.uint8)
        erase(image, rng.random(3), rng.random(2))
        hole = (image == FILL).all(-1)
        assert (image[~hole] == 0).all()
        if not hole.any():
            continue
        rows, columns = hole.any(1).nonzero()[0], hole.any(0).nonzero()[0]
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        areas.append(hole.mean())
        ratios.append(len(rows) / len(columns))
        touched += hole
    assert len(areas) / 2000 == pytest.approx(0.25, abs=0.03)
    assert 0.015 < min(areas) < 0.03
    assert 0.3 < max(areas) <= 0.345
    assert 1 / 4.2 < min(ratios) < 0.4
    assert 2.5 < max(ratios) < 4.2
    assert touched.min() > 0  # the edges and corners too


def test_heavy_views_are_the_map_and_colours_then_the_operations(monkeypatch):
    """With the operations and holes switched off, heavy is a strength like the others; with one
    operation on, every picture shows it."""
    images, n = photos(12), np.arange(12)
    monkeypatch.setattr(operations, "ERASED", 0)
    monkeypatch.setattr(operations, "OPERATIONS", (operations.identity,))
    plain = augment_batch(images, n, 2, 3, "heavy", 56)
    monkeypatch.setitem(STRENGTHS, "same", STRENGTHS["heavy"])
    assert np.array_equal(plain, augment_batch(images, n, 2, 3, "same", 56))
    monkeypatch.setattr(operations, "OPERATIONS", (lambda image, strength: 255 - image,) * 2)
    assert np.array_equal(augment_batch(images, n, 2, 3, "heavy", 56), plain)  # inverted twice
    monkeypatch.setattr(
        operations, "OPERATIONS", (lambda image, strength: cv2.flip(image, 0) // 2,)
    )
    once = augment_batch(images, n, 2, 3, "heavy", 56)
    assert np.array_equal(once, plain // 4)
    monkeypatch.setattr(operations, "OPERATIONS", (operations.identity,))
    monkeypatch.setattr(operations, "ERASED", 1)
    erased = augment_batch(images, n, 2, 3, "heavy", 56)
    differs = (erased != plain).any(-1)
    assert (differs.mean((1, 2)) > 0.01).all()
    assert (erased[differs] == FILL).all()

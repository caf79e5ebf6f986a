"""Duplicates: every kind of copy is found, and pictures that only look alike are left apart."""

import io
import os
import threading
import time

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from train.data import open_photos
from train.data.dishes import DISHES
from train.data.duplicates import (
    Groups,
    agreement,
    in_order,
    photo_groups,
    picture_groups,
    thumbnail,
)
from train.data.perceptual import SIDE, Candidate
from train.data.synthetic import draw

PER_DISH = 12


@pytest.fixture(scope="module")
def drawings() -> list[Image.Image]:
    """Sixty distinct dishes on plates that resemble each other."""
    return [Image.fromarray(draw(5, dish, i)) for dish in DISHES for i in range(PER_DISH)]


def groups_of(pictures: list[Image.Image]) -> list[int]:
    thumbnails = np.stack([thumbnail(picture) for picture in pictures])
    return picture_groups(thumbnails, np.arange(len(pictures)), progress=False).tolist()


def encoded(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def scaled(picture: Image.Image, factor: float) -> Image.Image:
    size = (round(picture.width * factor), round(picture.height * factor))
    return picture.resize(size, Image.Resampling.BICUBIC)


def cropped(picture: Image.Image, cut: float, rng: np.random.Generator) -> Image.Image:
    """Without a share `cut` of both sides, taken from anywhere."""
    left, top = rng.uniform(0, cut, 2)
    box = (left, top, left + 1 - cut, top + 1 - cut)
    return picture.crop(tuple(round(share * picture.width) for share in box))


COPIES = {
    "quality 60": lambda p, r: encoded(p, 60),
    "quality 95": lambda p, r: encoded(p, 95),
    "half": lambda p, r: scaled(p, 0.5),
    "double": lambda p, r: scaled(p, 2),
    "wider": lambda p, r: p.resize((p.width * 3 // 2, p.height)),
    "crop 5 %": lambda p, r: cropped(p, 0.05, r),
    "crop 10 %": lambda p, r: cropped(p, 0.1, r),
    "crop 15 %": lambda p, r: cropped(p, 0.15, r),
    "square of 3:2": lambda p, r: p.crop(
        (p.width // 8, 0, p.width // 8 + p.width * 2 // 3, p.height)
    ),
    "mirror": lambda p, r: ImageOps.mirror(p),
    "mirrored crop": lambda p, r: ImageOps.mirror(cropped(p, 0.1, r)),
    "darker": lambda p, r: ImageEnhance.Brightness(p).enhance(0.9),
    "brighter": lambda p, r: ImageEnhance.Brightness(p).enhance(1.1),
    "grey": lambda p, r: p.convert("L").convert("RGB"),
    "all": lambda p, r: ImageEnhance.Brightness(
        ImageOps.mirror(encoded(scaled(cropped(p, 0.1, r), 0.6), 70))
    ).enhance(0.9),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_and_nothing_else_is_joined(drawings, kind):
    rng = np.random.default_rng(0)
    n = len(drawings)
    groups = groups_of([*drawings, *(COPIES[kind](picture, rng) for picture in drawings)])
    found = sum(groups[i] == groups[n + i] for i in range(n))
    assert found >= 0.98 * n
    assert len(set(groups)) == 2 * n - found  # whatever else was joined would leave fewer groups


def test_distinct_dishes_stay_apart():
    pictures = [Image.fromarray(draw(1, dish, i)) for dish in DISHES for i in range(50)]
    assert groups_of(pictures) == list(range(250))


def test_a_caption_over_a_part_is_forgiven(drawings):
    values = []
    for picture in drawings:
        captioned = picture.copy()
        captioned.paste((250, 250, 250), (0, 0, picture.width // 3, picture.height // 6))
        values.append(agreement(thumbnail(picture), thumbnail(captioned), Candidate(0, 1)))
    assert min(values) > 0.88


def cut_out(seed: int, background: int) -> Image.Image:
    """A thing of its own texture in the middle of a plain picture."""
    picture = np.full((128, 128, 3), background, np.uint8)
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    thing = cv2.resize(coarse, (60, 60), interpolation=cv2.INTER_CUBIC)
    picture[34:94, 34:94] = thing
    return Image.fromarray(picture)


@pytest.mark.parametrize("background", [0, 128, 255])
def test_a_common_plain_background_does_not_make_two_pictures_one(background):
    different = [cut_out(seed, background) for seed in range(40)]
    assert groups_of(different) == list(range(40))
    groups = groups_of([*different, *(encoded(picture, 60) for picture in different)])
    assert groups == [*range(40), *range(40)]


def test_a_logo_on_every_photo_does_not_join_them(drawings):
    logo = cut_out(0, 255).resize((60, 60))
    marked = [picture.copy() for picture in drawings]
    for picture in marked:
        picture.paste(logo, (picture.width - 60, picture.height - 60))
    assert groups_of(marked) == list(range(len(marked)))


def test_pictures_without_detail_join_their_identical_copies_only():
    plain = np.stack([np.full((SIDE, SIDE), level, np.uint8) for level in (0, 90, 90, 255)])
    ramp = np.tile(np.arange(SIDE, dtype=np.uint8), (SIDE, 1))
    pictures = np.concatenate([plain, [ramp, ramp]])
    contents = np.array([7, 3, 3, 5, 1, 0])
    assert picture_groups(pictures, contents, progress=False).tolist() == [0, 1, 1, 2, 3, 4]


def test_none_and_one(drawings):
    assert picture_groups(np.zeros((0, SIDE, SIDE), np.uint8), np.zeros(0, int)).tolist() == []
    assert groups_of(drawings[:1]) == [0]


def test_a_crowd_of_one_picture_becomes_one_group_without_comparing_all_pairs(drawings):
    """Many slightly different copies, among others: more than a bucket is searched for."""
    rng = np.random.default_rng(0)
    small = thumbnail(drawings[0]).astype(float)
    copies = np.clip(small + rng.normal(0, 1.5, (600, SIDE, SIDE)), 0, 255).astype(np.uint8)
    others = np.stack([thumbnail(picture) for picture in drawings[1:]])
    began = time.perf_counter()
    everything = np.concatenate([copies, others])
    groups = picture_groups(everything, np.arange(len(everything)), progress=False)
    assert len(set(groups[:600])) == 1
    assert len(set(groups)) == len(drawings)
    assert time.perf_counter() - began < 20


def test_contents_join_though_the_thumbnails_differ(drawings):
    """Identical content is the caller's knowledge: it does not hang on how pictures look."""
    thumbnails = np.stack([thumbnail(picture) for picture in drawings[:4]])
    groups = picture_groups(thumbnails, np.array([4, 2, 4, 9]), progress=False)
    assert groups.tolist() == [0, 1, 0, 2]


def test_agreement_falls_with_what_differs(drawings):
    whole, other = thumbnail(drawings[0]), thumbnail(drawings[1])
    assert agreement(whole, whole, Candidate(0, 1)) > 0.999
    assert agreement(whole, np.ascontiguousarray(whole[:, ::-1]), Candidate(0, 1, True)) > 0.999
    box = (0.1, 0.05, 0.85, 0.9)
    size = drawings[0].width
    part = drawings[0].crop(
        tuple(round(size * x) for x in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    )
    assert agreement(whole, thumbnail(part), Candidate(0, 1, False, box)) > 0.95
    assert agreement(whole, other, Candidate(0, 1)) < 0.7


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=12),
        )
    )
)
def test_groups_are_connected_components(case):
    n, pairs = case
    groups = Groups(n)
    reach = np.eye(n, dtype=int)
    for i, j in pairs:
        groups.join(i, j)
        reach[i, j] = reach[j, i] = 1
    together = np.linalg.matrix_power(reach, n) > 0
    numbers = groups.numbers()
    assert ((numbers[:, None] == numbers) == together).all()
    assert numbers[np.sort(np.unique(numbers, return_index=True)[1])].tolist() == list(
        range(numbers.max() + 1)
    )
    assert all(groups.joined(i, j) for i, j in pairs)


def test_in_order_keeps_the_order_and_a_bounded_number_ahead():
    started, lock = [], threading.Lock()

    def double(i: int) -> int:
        with lock:
            started.append(i)
        time.sleep(0.001 * (i % 3))
        return 2 * i

    results = in_order(double, range(1000))
    assert [next(results) for _ in range(5)] == [0, 2, 4, 6, 8]
    time.sleep(0.1)
    assert len(started) <= 5 + 4 * os.cpu_count()
    results.close()
    assert len(started) <= 5 + 4 * os.cpu_count()
    assert list(in_order(double, range(100))) == list(range(0, 200, 2))


def test_photo_groups_of_a_folder(tmp_path, drawings):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
    drawings[0].save(tmp_path / "a" / "1.png")
    encoded(drawings[0], 70).save(tmp_path / "a" / "2.jpg")
    drawings[1].save(tmp_path / "a" / "3.png")
    ImageOps.mirror(drawings[0]).save(tmp_path / "b" / "1.png")
    (tmp_path / "b" / "2.jpg").write_bytes(b"<html>")
    (tmp_path / "b" / "3.jpg").write_bytes(b"<body>")
    (tmp_path / "b" / "4.png").write_bytes((tmp_path / "a" / "3.png").read_bytes())
    photos = open_photos(str(tmp_path))
    assert photo_groups(photos, progress=False).tolist() == [0, 0, 1, 0, 2, 3, 1]

"""Augmentation: Philox against its published vectors and Triton, views against exact maps."""

import cv2
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import DEVICE
from train.data.augment import (
    AUGMENTS,
    STRENGTHS,
    augment_batch,
    balanced_order,
    cutmix,
    mixup,
    order,
    philox,
    philox4x32,
    uniform,
)
from train.data.resident import KERNEL_AUGMENTS

# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    assert philox4x32(counter, key).tolist() == expected


@triton.jit
def _philox_kernel(words_ptr, floats_ptr, index_ptr, seed, draw, epoch, N: tl.constexpr):
    lanes = tl.arange(0, N)
    index = tl.load(index_ptr + lanes)
    zero = index * 0
    words = tl.philox(seed, zero + draw, index, zero + epoch, zero)
    for k in tl.static_range(4):
        tl.store(words_ptr + k * N + lanes, words[k].to(tl.int32, bitcast=True))
        tl.store(floats_ptr + k * N + lanes, tl.random.uint_to_uniform_float(words[k]))


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 12345])
def test_philox_is_bit_equal_to_tritons(seed):
    index = torch.arange(1000, 1064, dtype=torch.int32, device=DEVICE)
    words = torch.empty(4, 64, dtype=torch.int32, device=DEVICE)
    floats = torch.empty(4, 64, dtype=torch.float32, device=DEVICE)
    _philox_kernel[(1,)](words, floats, index, seed, 2, 31, N=64)
    expected = philox(seed, 2, index.cpu().numpy(), 31)
    assert np.array_equal(words.cpu().numpy().view(np.uint32), expected)
    beyond = index.cpu().numpy() + np.int64(2**32)  # a GPU's uint32 wraps as well
    assert np.array_equal(philox(seed, 2, beyond, 31), expected)
    ours = uniform(seed, 2, index.cpu().numpy(), 31)
    assert ours.dtype == np.float32
    assert np.array_equal(floats.cpu().numpy(), ours)


def test_uniform_numbers_are_uniform():
    numbers = uniform(3, 0, np.arange(50_000), 1)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.stack([np.histogram(row, 20, (0, 1))[0] for row in numbers])
    assert np.abs(counts - 2500).max() < 5 * np.sqrt(2500)
    assert np.abs(np.corrcoef(numbers) - np.eye(4)).max() < 0.02


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(0, 2**63), st.integers(0, 1000))
def test_order_is_a_permutation_of_its_own(n, seed, epoch):
    first = order(n, seed, epoch)
    assert sorted(first.tolist()) == list(range(n))
    assert np.array_equal(first, order(n, seed, epoch))
    if n > 20:
        assert not np.array_equal(first, order(n, seed, epoch + 1))
        assert not np.array_equal(first, order(n, seed + 1, epoch))


def photos(n: int = 6, size: int = 64) -> np.ndarray:
    """Smooth pictures, each different."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (n, 5, 5, 3), dtype=np.uint8)
    return np.stack([cv2.resize(c, (size, size), interpolation=cv2.INTER_CUBIC) for c in coarse])


def test_none_is_the_identity_or_an_antialiased_whole():
    images = photos()
    same = augment_batch(images, np.arange(6), 0, 0, "none", 64)
    assert np.array_equal(same, images)
    half = augment_batch(images, np.arange(6), 0, 0, "none", 32)
    boxes = images.reshape(6, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(half - boxes).max() <= 1


@pytest.mark.parametrize("kind", ["light", "strong", "heavy"])
def test_a_view_depends_on_seed_epoch_and_index_alone(kind):
    images = photos()
    indices = np.array([10, 11, 12, 13, 14, 15])
    views = augment_batch(images, indices, 3, 5, kind, 56)
    assert views.shape == (6, 56, 56, 3)
    assert views.dtype == np.uint8
    turned = augment_batch(images[::-1], indices[::-1], 3, 5, kind, 56)[::-1]
    assert np.array_equal(views, turned)
    alone = augment_batch([images[2]], indices[2:3], 3, 5, kind, 56)
    assert np.array_equal(alone[0], views[2])
    for other in (
        augment_batch(images, indices, 4, 5, kind, 56),
        augment_batch(images, indices, 3, 6, kind, 56),
        augment_batch(images, indices + 6, 3, 5, kind, 56),
    ):
        assert all(
            np.abs(a.astype(int) - b).mean() > 0.5 for a, b in zip(views, other, strict=True)
        )
    assert np.array_equal(images, photos())  # the stored pictures are never written to


def coordinates(size: int) -> np.ndarray:
    """A picture whose red is x and green is y, so that a view shows where it looked."""
    x = np.tile((np.arange(size) + 0.5) * 256 / size - 0.5, (size, 1))
    return np.stack([x, x.T, np.full_like(x, 128)], -1).round().astype(np.uint8)


@pytest.mark.parametrize("kind", ["light", "strong"])
def test_views_stay_within_their_strength(kind):
    """Fits the affine map each view used and reads crop, flip and angle off it."""
    strength = STRENGTHS[kind]
    size, n = 128, 300
    views = augment_batch([coordinates(size)] * n, np.arange(n), 0, 1, "light", size)
    if kind == "strong":
        quiet = {"strong": type(strength)(strength.area, strength.ratio, strength.degrees, 0)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train.data.augment.STRENGTHS", quiet)
            views = augment_batch([coordinates(size)] * n, np.arange(n), 0, 1, "strong", size)
    margin = 40  # reflected borders of rotated crops lie outside
    grid = np.arange(margin, size - margin)
    x, y = np.meshgrid(grid, grid)
    design = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], 1)
    inner = views[:, margin:-margin, margin:-margin, :2].reshape(n, -1, 2).astype(float)
    maps = np.linalg.lstsq(design, inner.transpose(1, 0, 2).reshape(len(design), -1), rcond=None)[0]
    maps = maps.reshape(3, n, 2).transpose(1, 2, 0) * np.array([size / 256, size / 256, 1])
    scale = 0.5  # red and green run over 256 levels in 128 pixels
    linear = views_linear = maps[:, :, :2]
    area = np.abs(np.linalg.det(linear)) * (256 / size) ** 2 * scale**2
    assert area.min() > strength.area - 0.03
    assert area.max() < 1.03
    assert area.min() < strength.area + 0.1 * (1 - strength.area) + 0.03
    flipped = np.linalg.det(views_linear) < 0
    assert 0.4 < flipped.mean() < 0.6
    angle = np.rad2deg(np.arctan2(-linear[:, 0, 1], linear[:, 1, 1]))
    assert np.abs(angle).max() < strength.degrees + 1.5
    if strength.degrees:
        assert np.abs(angle).max() > 0.8 * strength.degrees


def test_colour_jitter_matches_its_three_steps_one_after_another():
    """Brightness, contrast about the mean grey, saturation about each pixel's grey, in float64."""
    images = photos(40)
    plain = type(STRENGTHS["strong"])(1, 1, 0, 0)
    jitter = type(plain)(1, 1, 0, 0.3)
    indices = np.arange(40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.data.augment.STRENGTHS", {"plain": plain, "jitter": jitter})
        before = augment_batch(images, indices, 0, 9, "plain", 64).astype(float)
        after = augment_batch(images, indices, 0, 9, "jitter", 64)
    draws = uniform(9, 2, indices, 0)[:3].astype(float)
    grey = np.array([0.299, 0.587, 0.114])
    for i, (b, c, s) in enumerate((0.7 + 0.6 * draws).T):
        bright = before[i] * b
        contrasted = c * bright + (1 - c) * (bright @ grey).mean()
        expected = s * contrasted + (1 - s) * (contrasted @ grey)[..., None]
        assert np.abs(after[i] - expected.clip(0, 255)).max() <= 1  # of 255, fixed-point
    assert draws.min() < 0.1
    assert draws.max() > 0.9


def test_full_crops_without_rotation_only_flip():
    """The affine map hits pixel centres exactly: an unflipped full view is the picture itself."""
    images = photos(20)
    with pytest.MonkeyPatch.context() as patch:
        whole = type(STRENGTHS["light"])(1, 1, 0, 0)
        patch.setattr("train.data.augment.STRENGTHS", {"whole": whole})
        views = augment_batch(images, np.arange(20), 0, 0, "whole", 64)
    kept = [np.array_equal(a, b) for a, b in zip(views, images, strict=True)]
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(views, images, strict=True)]
    assert all(k != m for k, m in zip(kept, mirrored, strict=True))
    assert 4 <= sum(kept) <= 16


def test_mixup_is_a_function_of_seed_epoch_and_batch():
    lam, permutation = mixup(32, 0.2, seed=1, epoch=2, batch=3)
    again = mixup(32, 0.2, seed=1, epoch=2, batch=3)
    assert lam == again[0]
    assert np.array_equal(permutation, again[1])
    assert sorted(permutation.tolist()) == list(range(32))
    assert lam != mixup(32, 0.2, seed=1, epoch=2, batch=4)[0]
    lams = np.array([mixup(2, 0.2, seed=0, epoch=0, batch=b)[0] for b in range(3000)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
    assert abs(lams.mean() - 0.5) < 0.03
    assert abs(lams.var() - 1 / (4 * 1.4)) < 0.01
    assert mixup(4, 0, seed=0, epoch=0, batch=0)[0] == 1.0


def test_cutmix_boxes_cover_the_drawn_share_where_they_are_whole():
    box, partner = cutmix(32, 1.0, seed=1, epoch=2, batch=3)
    again = cutmix(32, 1.0, seed=1, epoch=2, batch=3)
    assert (box.tolist(), partner.tolist()) == (again[0].tolist(), again[1].tolist())
    assert sorted(partner.tolist()) == list(range(32))
    drawn = [cutmix(2, 1.0, seed=0, epoch=0, batch=b)[0] for b in range(3000)]
    top, left, bottom, right = np.array(drawn).T
    assert min(top.min(), left.min()) == 0
    assert max(bottom.max(), right.max()) == 1
    assert ((top <= bottom) & (left <= right)).all()
    whole = (top > 0) & (left > 0) & (bottom < 1) & (right < 1)
    assert np.abs((bottom - top) - (right - left))[whole].max() < 1e-6
    # a side s = sqrt(1 - lam) has the density 2 s for a uniform lam; what the cut leaves of it in
    # one axis, on average over the centres, by quadrature
    side = (np.arange(2000) + 0.5) / 2000
    centre = (np.arange(500) + 0.5) / 500
    first = np.clip(centre - side[:, None] / 2, 0, 1)
    length = (np.clip(centre + side[:, None] / 2, 0, 1) - first).mean(1)
    expected = (2 * side * length**2).mean()
    area = (bottom - top) * (right - left)
    assert area.mean() == pytest.approx(expected, abs=4 * area.std() / np.sqrt(3000))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(0, 2**63), st.integers(0, 9)
)
def test_a_balanced_epoch_shows_each_class_equally_often(labels, seed, epoch):
    labels = np.array(labels)
    chosen = balanced_order(labels, seed, epoch)
    assert len(chosen) == len(labels)
    assert np.array_equal(chosen, balanced_order(labels, seed, epoch))
    shown = np.bincount(labels[chosen], minlength=5)[np.unique(labels)]
    assert shown.max() - shown.min() <= 1


def test_balanced_draws_are_even_and_their_order_is_shuffled():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    epochs = np.stack([balanced_order(labels, 7, epoch) for epoch in range(300)])
    counts = np.bincount(epochs.ravel(), minlength=100)
    assert counts.sum() == 30_000
    assert counts[99] == counts[90:99].sum() == counts[:90].sum() == 10_000  # over three epochs
    assert np.abs(counts[:90] - 10_000 / 90).max() < 5 * np.sqrt(10_000 / 90)
    assert np.abs(counts[90:99] - 10_000 / 9).max() < 5 * np.sqrt(10_000 / 9)
    # every place in the epoch has every class in a third of the epochs
    share = (labels[epochs] == 2).mean(0)
    assert np.abs(share - 1 / 3).max() < 5 * np.sqrt(2 / 9 / 300)


def test_the_list_of_augmentations():
    assert AUGMENTS == ("none", "light", "strong", "heavy")
    assert KERNEL_AUGMENTS == ("none", "light", "strong")

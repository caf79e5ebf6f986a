"""batch.png: the pictures and shares of the very first step, under the right names."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from tests.test_step import OPTIM, micro_resnet
from train.data.augment import augment_batch, cutmix
from train.data.loader import Loader
from train.data.resident import ResidentLoader
from train.mosaic import COLUMNS, FONT, GAP, LINE, TILE, _fitting, draw_batch, first_batch
from train.training import Training

CLASSES = ["bakso", "gado-gado", "soto ayam lamongan dengan koya dan telur", "$x_1$", "rendang"]
N = 40


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (N, 40, 40, 3), dtype=np.uint8)


def loader(images, kind=Loader, **options):
    options = {"batch_size": 36, "image_size": 32, "shuffle": True, "seed": 2} | options
    labels = np.arange(N) % 5
    if kind is Loader:
        return Loader(images, labels, np.arange(N), workers=0, **options)
    return ResidentLoader(torch.from_numpy(images), labels, np.arange(N), **options)


def training(**options) -> Training:
    return Training(micro_resnet(), OPTIM, total_steps=4, amp_dtype=None, seed=2, **options)


@pytest.mark.parametrize(
    ("kind", "alphas"),
    [
        (Loader, {}),
        (Loader, {"mixup_alpha": 0.4}),
        (Loader, {"cutmix_alpha": 1.0}),
        (ResidentLoader, {"cutmix_alpha": 1.0}),
    ],
)
def test_it_is_what_the_first_step_sees(images, alphas, kind):
    run = training(**alphas)
    source = loader(images, kind, augment="light")
    seen = []
    run.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    shown, others, share = first_batch(source, run)
    first = next(iter(source.epoch(1)))
    run.train_step(first, 1, 1)
    assert len(shown.images) == 32
    assert torch.equal(shown.images, seen[0][:32])
    assert (others is None) == (not alphas)
    assert torch.equal(shown.labels, first.labels[:32])
    if alphas:
        partner, lam, *box = run.mixing(36, 1, 1)
        assert torch.equal(others.labels, first.labels[partner][:32])
        if box:
            top, left, bottom, right = (32 * box[0]).round().tolist()
            assert share == pytest.approx(1 - (bottom - top) * (right - left) / 32**2)
        else:
            assert share == lam


def test_pixels_come_out_as_they_went_in(images, tmp_path):
    """Normalised and back: the tiles are the augmented pictures, pixel for pixel, four times as
    large; the pasted box is the partner's."""
    source, run = loader(images, augment="light"), training(cutmix_alpha=1.0)
    shown, others, share = first_batch(source, run)
    draw_batch(shown, others, share, CLASSES, tmp_path / "batch.png")
    picture = np.asarray(Image.open(tmp_path / "batch.png"))
    assert picture.shape == (
        GAP + 4 * (TILE + GAP + 2 * LINE),
        GAP + COLUMNS * (TILE + GAP),
        3,
    )
    rows = source.rows(1)[:36]
    views = augment_batch(images[rows], rows, 1, 2, "light", 32)
    box, partner = cutmix(36, 1.0, seed=2, epoch=1, batch=1)
    top, left, bottom, right = (32 * box).round().astype(int)
    pasted = views.copy()
    pasted[:, top:bottom, left:right] = views[partner][:, top:bottom, left:right]
    for i in range(32):
        x, y = GAP + i % 8 * (TILE + GAP), GAP + i // 8 * (TILE + GAP + 2 * LINE)
        tile = picture[y : y + TILE, x : x + TILE]
        assert np.array_equal(tile[2::4, 2::4], pasted[i])
        below = picture[y + TILE : y + TILE + 2 * LINE, x : x + TILE]
        assert below.min() < 120  # something is written there
    assert (picture[:, :GAP] == 255).all()


def test_few_pictures_and_large_ones(images, tmp_path):
    large = np.random.default_rng(0).integers(0, 256, (N, 256, 256, 3), dtype=np.uint8)
    few = loader(large, batch_size=3, image_size=256)
    draw_batch(*first_batch(few, training()), CLASSES, tmp_path / "batch.png")
    assert Image.open(tmp_path / "batch.png").size == (
        GAP + 3 * (TILE + GAP),
        GAP + TILE + GAP + LINE,
    )


@pytest.mark.parametrize("name", [*CLASSES, "", "a\nb", "\u0441\u0443\u043f " * 20, "x" * 400])
def test_names_fit_their_tile(name):
    font = ImageFont.truetype(FONT, 11)
    text = _fitting(name, " 77%", font)
    assert font.getlength(text) <= TILE
    assert text.endswith(" 77%")
    assert "\n" not in text
    assert text.startswith(name[:1].strip())

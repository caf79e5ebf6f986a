"""The benchmark's pictures: made in a moment, learnable, and what spoils them; photos too, where
they are."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from train.config import DEFAULT
from train.data.dishes import DISHES
from train.data.synthetic import draw
from train.inputs import load_inputs

SIDE, CLASSES = 16, 4
DISH_SIDE = 32
PHOTOS = Path(__file__).resolve().parents[4] / "shared" / "data" / "food5"  # beside the checkout
PHOTO_CLASSES = ("bakso", "gado_gado", "rendang", "soto_ayam")

Pictures = tuple[Tensor, Tensor]  # float32 [N, 3, S, S] as fed, labels int64 [N]


def patterns(
    seed: int, count: int = 128, noise: float = 1.0, val: int = 160, shares: tuple = ()
) -> tuple[Pictures, Pictures]:
    """A smooth pattern for each of CLASSES, under noise; `shares`: of each class, else equal."""
    made = torch.Generator().manual_seed(seed)
    shapes = torch.randn(CLASSES, 3, 4, 4, generator=made)
    shapes = nn.functional.interpolate(shapes, size=SIDE, mode="bilinear")

    def some(number: int) -> Pictures:
        labels = torch.arange(number) % CLASSES
        if shares:
            edges = (np.cumsum(shares) / sum(shares) * number).round()
            labels = torch.from_numpy(np.searchsorted(edges, np.arange(number), side="right"))
        images = shapes[labels]
        return images + noise * torch.randn(images.shape, generator=made), labels

    return some(count), some(val)


@functools.lru_cache(maxsize=2)
def dishes(seed: int, count: int = 160, val: int = 120) -> tuple[Pictures, Pictures]:
    """Drawn dishes, DISH_SIDE pixels a side, normalised over the training ones."""
    names = sorted(DISHES)[:CLASSES]

    def some(first: int, number: int) -> Pictures:
        labels = torch.arange(number) % CLASSES
        drawn = [draw(seed, names[k], first + i) for i, k in enumerate(labels.tolist())]
        small = [cv2.resize(d, (DISH_SIDE,) * 2, interpolation=cv2.INTER_AREA) for d in drawn]
        return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float(), labels

    return _normalised(some(0, count), some(count, val))


@functools.lru_cache(maxsize=2)
def photos(seed: int) -> tuple[Pictures, Pictures]:
    """CLASSES of the photos in PHOTOS, DISH_SIDE pixels a side, each seed with a split of its own
    that keeps copies on one side. Raises DataError."""
    data = replace(
        DEFAULT.data,
        data=str(PHOTOS),
        classes=PHOTO_CLASSES,
        image_size=DISH_SIDE,
        val_scale=1.0,
        val_crop=1.0,
        augment="none",
    )
    found = load_inputs(replace(DEFAULT, data=data, run=replace(DEFAULT.run, seed=seed)))
    pixels = torch.tensor(found.images).permute(0, 3, 1, 2).float()
    labels = torch.from_numpy(found.photos.labels)
    train, val = found.split.train, found.split.val
    return _normalised((pixels[train], labels[train]), (pixels[val], labels[val]))


def _normalised(train: Pictures, val: Pictures) -> tuple[Pictures, Pictures]:
    """By the mean and deviation of each channel of the training pictures."""
    deviation, mean = torch.std_mean(train[0], (0, 2, 3), keepdim=True)
    return tuple(((images - mean) / deviation, labels) for images, labels in (train, val))


def few_photos(seed: int) -> tuple[Pictures, Pictures]:
    (images, labels), val = photos(seed)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:48]
    return (images[chosen], labels[chosen]), val


def forty(seed: int) -> tuple[Pictures, Pictures]:
    return patterns(seed, 40, noise=3.0, val=200)


def few_dishes(seed: int) -> tuple[Pictures, Pictures]:
    (images, labels), val = dishes(seed)
    return (images[:48], labels[:48]), val


def changed(change: Callable[[Tensor], Tensor]):
    """Patterns whose pixels `change` alters, in validation too."""

    def make(seed: int) -> tuple[Pictures, Pictures]:
        (images, labels), (others, other_labels) = patterns(seed)
        return (change(images), labels), (change(others), other_labels)

    return make


def hole(images: Tensor) -> Tensor:
    images[:, 0, 3, 3] = torch.nan
    return images


def look_alike(seed: int) -> tuple[Pictures, Pictures]:
    """The last class's unseen pictures are of all the other classes."""
    (images, labels), (others, other_labels) = patterns(seed, 240, val=200)
    marked = other_labels == CLASSES - 1
    others[marked] = others[~marked][: int(marked.sum())]
    images[labels == CLASSES - 1] = torch.randn(
        images[labels == CLASSES - 1].shape, generator=torch.Generator().manual_seed(seed)
    )
    return (images, labels), (others, other_labels)


def rare(seed: int) -> tuple[Pictures, Pictures]:
    """Two training pictures of the last class and 80 of each other, under much noise."""
    (images, labels), val = patterns(seed, 320, val=200, noise=2.0)
    kept = torch.cat([(labels != 3).nonzero()[:, 0], (labels == 3).nonzero()[:2, 0]])
    return (images[kept], labels[kept]), val


def random_labels(make: Callable[[int], tuple[Pictures, Pictures]]):
    def shuffled(seed: int) -> tuple[Pictures, Pictures]:
        (images, labels), val = make(seed)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        return (images, labels[order]), val

    return shuffled


def leaked(count: int):
    """The first `count` validation pictures are training pictures."""

    def make(seed: int) -> tuple[Pictures, Pictures]:
        (images, labels), (others, other_labels) = patterns(seed)
        others[:count], other_labels[:count] = images[:count], labels[:count]
        return (images, labels), (others, other_labels)

    return make


def unevenly_lit(seed: int) -> tuple[Pictures, Pictures]:
    """Few patterns, each picture with a contrast and colours of its own: two of them say little of
    the others' mean and deviation."""
    made = torch.Generator().manual_seed(seed)

    def light(images: Tensor) -> Tensor:
        contrast = torch.exp(0.8 * torch.randn(len(images), 1, 1, 1, generator=made))
        return images * contrast + 2 * torch.randn(len(images), 3, 1, 1, generator=made)

    (images, labels), (others, other_labels) = patterns(seed, 96)
    return (light(images), labels), (light(others), other_labels)

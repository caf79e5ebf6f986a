"""The loader: the same batches whatever the threads, normalised right, never hanging."""

import threading

import numpy as np
import pytest
import torch

from train.data import Loader
from train.data.augment import MEAN, STD
from train.errors import UsageError

N = 23


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (N, 40, 40, 3), dtype=np.uint8)


LABELS = np.arange(N) % 5


def loader(images, **options):
    options = {"batch_size": 4, "image_size": 40, "workers": 0} | options
    return Loader(images, LABELS, np.arange(N), **options)


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(x, y)
        for a, b in zip(first, second, strict=True)
        for x, y in zip(a, b, strict=True)
    )


def truth(pixels: np.ndarray) -> torch.Tensor:
    normalised = (pixels / 255.0 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(normalised).permute(0, 3, 1, 2)


def test_plain_batches_are_the_images_normalised_in_order(images):
    batches = list(loader(images).epoch(0))
    assert [len(b.labels) for b in batches] == [4, 4, 4, 4, 4, 3]
    assert len(loader(images)) == 6
    assert torch.cat([b.indices for b in batches]).tolist() == list(range(N))
    assert torch.cat([b.labels for b in batches]).tolist() == LABELS.tolist()
    assert batches[0].labels.dtype == torch.int64
    shown = torch.cat([b.images for b in batches])
    assert shown.dtype == torch.float32
    assert (shown - truth(images)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_layout_and_single_rounding(images, dtype, channels_last):
    (batch, *_) = loader(images, dtype=dtype, channels_last=channels_last).epoch(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.images.shape == (4, 3, 40, 40)
    assert batch.images.is_contiguous(memory_format=layout)
    assert torch.equal(batch.images, truth(images[:4]).to(dtype))


@pytest.mark.parametrize("augment", ["none", "light", "strong", "heavy"])
def test_workers_and_start_change_nothing(images, augment):
    options = {"augment": augment, "shuffle": True, "image_size": 35, "seed": 11}
    expected = list(loader(images, **options).epoch(4))
    for workers in (1, 2, 5):
        again = loader(images, **options, workers=workers)
        assert same(list(again.epoch(4)), expected)
        assert same(list(again.epoch(4, start=3)), expected[3:])
        assert list(again.epoch(4, start=len(again))) == []
    assert not same(list(loader(images, **options).epoch(5)), expected)


def test_a_photo_looks_the_same_in_any_batch_and_any_subset(images):
    options = {"augment": "strong", "image_size": 35, "seed": 2, "workers": 0}
    (whole,) = Loader(images, LABELS, np.arange(N), batch_size=N, **options).epoch(1)
    (part,) = Loader(images, LABELS, np.array([17, 3]), batch_size=2, **options).epoch(1)
    assert part.indices.tolist() == [17, 3]
    assert part.labels.tolist() == LABELS[[17, 3]].tolist()
    assert torch.equal(part.images, whole.images[[17, 3]])


def test_shuffling_visits_every_photo_once_in_a_new_order(images):
    shuffled = loader(images, shuffle=True)
    orders = [torch.cat([b.indices for b in shuffled.epoch(e)]).tolist() for e in range(3)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != list(range(N))


def test_a_last_batch_of_one_joins_its_neighbour_when_training(images):
    sizes = [len(b.labels) for b in loader(images, batch_size=11, shuffle=True).epoch(0)]
    assert sizes == [11, 12]
    assert len(loader(images, batch_size=11, shuffle=True)) == 2
    evaluated = [len(b.labels) for b in loader(images, batch_size=11).epoch(0)]
    assert evaluated == [11, 11, 1]
    full = [len(b.labels) for b in loader(images, batch_size=11, drop_last=True).epoch(0)]
    assert full == [11, 11]
    assert [len(b.labels) for b in loader(images, batch_size=1, shuffle=True).epoch(0)] == [1] * N


def test_usage_errors(images):
    with pytest.raises(UsageError, match="--augment wild"):
        loader(images, augment="wild")
    with pytest.raises(UsageError, match="--batch-size 0"):
        loader(images, batch_size=0)
    with pytest.raises(UsageError, match="--batch-size 24 is more than the 23 photos"):
        loader(images, batch_size=24, drop_last=True)
    with pytest.raises(ValueError, match="smaller than 41"):
        loader(images, image_size=41)


def test_a_balanced_epoch_repeats_photos_but_no_views(images):
    labels = np.array([0] * 20 + [1] * 3)
    options = {"batch_size": 8, "image_size": 35, "augment": "light", "shuffle": True, "seed": 1}
    balanced = Loader(images, labels, np.arange(N), balance=labels, workers=0, **options)
    batches = list(balanced.epoch(4))
    assert same(list(balanced.epoch(4, start=1)), batches[1:])
    threads = Loader(images, labels, np.arange(N), balance=labels, workers=3, **options)
    assert same(list(threads.epoch(4)), batches)
    rows = torch.cat([b.indices for b in batches])
    assert np.array_equal(rows, balanced.rows(4))
    shown = torch.cat([b.labels for b in batches])
    assert torch.equal(shown, torch.from_numpy(labels)[rows])
    assert sorted(np.bincount(shown).tolist()) == [11, 12]
    views = torch.cat([b.images for b in batches])
    assert len(torch.unique(views.flatten(1), dim=0)) == N  # some of three photos, each a new view
    # a photo's first view is the one it has without balance
    plain = Loader(images, labels, np.arange(N), **options)
    usual = {i.item(): x for b in plain.epoch(4) for i, x in zip(b.indices, b.images, strict=True)}
    for row in set(rows.tolist()):
        assert torch.equal(views[(rows == row).nonzero()[0, 0]], usual[row])
    numbers = balanced.view_numbers(np.array([5, 7, 5, 5, 7]))
    assert numbers.tolist() == [5, 7, 5 + N, 5 + 2 * N, 7 + N]


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("lapis-loader")]


def test_threads_stop_when_the_iterator_is_closed(images):
    iterator = loader(images, workers=3).epoch(0)
    next(iterator)
    assert len(loader_threads()) > 0
    iterator.close()
    assert loader_threads() == []
    for _ in loader(images, workers=3).epoch(0):
        pass
    assert loader_threads() == []


class Broken:
    """Images of which row 9 cannot be read."""

    def __init__(self, images):
        self.images, self.shape = images, images.shape

    def __getitem__(self, row):
        if row == 9:
            raise OSError("disk on fire")
        return self.images[row]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_reaches_the_consumer_in_its_turn(images, workers):
    iterator = loader(Broken(images), workers=workers).epoch(0)
    assert [len(next(iterator).labels) for _ in range(2)] == [4, 4]
    with pytest.raises(OSError, match="disk on fire"):
        next(iterator)
    assert loader_threads() == []


def test_only_a_few_batches_are_prepared_ahead(images):
    seen: list[int] = []

    class Watched(Broken):
        def __getitem__(self, row):
            seen.append(row)
            return self.images[row]

    iterator = loader(Watched(images), batch_size=1, workers=2).epoch(0)
    next(iterator)
    iterator.close()
    assert len(seen) <= 4


@pytest.mark.gpu
def test_batches_arrive_on_the_device(images):
    here = list(loader(images, augment="strong", image_size=35).epoch(0))
    there = list(loader(images, augment="strong", image_size=35, device="cuda", workers=2).epoch(0))
    assert all(t.is_cuda for batch in there for t in batch)
    assert there[0].images.is_contiguous(memory_format=torch.channels_last)
    assert same([type(b)(*(t.cpu() for t in b)) for b in there], here)


def test_an_epoch_has_its_own_size(images):
    growing = loader(images, image_size=(16, 16, 35), augment="strong", shuffle=True)
    for epoch, size in ((0, 16), (1, 16), (2, 16), (3, 35), (9, 35)):
        assert growing.size_at(epoch) == size
        assert all(batch.images.shape[2:] == (size, size) for batch in growing.epoch(epoch))
    (same, *_), (fixed, *_) = (
        one.epoch(3)
        for one in (growing, loader(images, augment="strong", image_size=35, shuffle=True))
    )
    assert torch.equal(same.images, fixed.images)

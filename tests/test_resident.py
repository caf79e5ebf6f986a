"""Batches from pixels on the device against those of the threads: same rows, labels and views."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import set_backend
from tests.helpers import DEVICE
from tests.test_graphs import Rerun
from tests.test_step import equal, micro_resnet, snapshot, steps, training
from train import inputs
from train.config import DEFAULT
from train.data import Loader, resident
from train.data.augment import STD
from train.data.resident import KERNEL_AUGMENTS, ResidentLoader, ViewLoader, upload
from train.graphs import CapturedStep
from train.inputs import Inputs, make_loaders, resident_pixels
from train.training import NonFiniteLoss

N = 11
LABELS = np.arange(N) % 3
ROWS = np.array([10, 1, 2, 3, 5, 7, 8])
# in levels of 0..255: the threads round to 8 bits after the affine map, which colours amplify by
# up to 1.3^3, and again after the colours
TOLERANCE = {"none": 0.51, "light": 0.52, "strong": 0.5 * 1.3**3 + 0.52}


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (N, 24, 24, 3), dtype=np.uint8)


def both(images, **options):
    options = {"batch_size": 3, "image_size": 21, "seed": 5} | options
    threads = Loader(images, LABELS, ROWS, workers=0, **options)
    return threads, ResidentLoader(upload(images, DEVICE), LABELS, ROWS, **options)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("augment", KERNEL_AUGMENTS)
def test_batches_are_those_of_the_loader(images, augment, shuffle):
    threads, ours = both(images, augment=augment, shuffle=shuffle)
    assert len(ours) == len(threads)
    for epoch, start in ((1, 0), (2, 0), (2, 1)):
        expected, found = list(threads.epoch(epoch, start)), list(ours.epoch(epoch, start))
        assert len(found) == len(expected) == len(ours) - start
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a.indices, b.indices.cpu())
            assert torch.equal(a.labels, b.labels.cpu())
            assert a.images.dtype == b.images.dtype
            assert b.images.is_contiguous(memory_format=torch.channels_last)
            levels = (a.images - b.images.cpu()) * 255 * torch.tensor(STD)[:, None, None]
            assert levels.abs().max() <= TOLERANCE[augment]


def test_a_balanced_epoch_is_that_of_the_loader(images):
    threads, ours = both(images, augment="light", shuffle=True, balance=LABELS[ROWS])
    for expected, found in zip(threads.epoch(2), ours.epoch(2), strict=True):
        assert torch.equal(expected.indices, found.indices.cpu())
        assert torch.equal(expected.labels, found.labels.cpu())
        levels = (expected.images - found.images.cpu()) * 255 * torch.tensor(STD)[:, None, None]
        assert levels.abs().max() <= TOLERANCE["light"]
    rows, numbers = np.array([5, 2]), np.array([16, 2])
    expected, found = (loader.batch(rows, numbers, 3) for loader in (threads, ours))
    assert found.indices.tolist() == [5, 2]
    assert (expected.images - found.images.cpu()).abs().mean() < 0.02


def test_what_the_kernel_does_not_know_is_made_by_the_threads(images, monkeypatch):
    with pytest.raises(ValueError, match="heavy"):
        both(images, augment="heavy")
    memory = SimpleNamespace(total_memory=2**40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    pixels, reason = resident_pixels(given(images), DEVICE, "triton", "heavy")
    assert (pixels, reason) == (None, "the kernels know no --augment heavy")
    assert resident_pixels(given(images), DEVICE, "triton", "strong")[0] is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_type_and_layout(images, dtype, channels_last):
    for loader in both(images, dtype=dtype, channels_last=channels_last):
        batch = next(iter(loader.epoch(1)))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert batch.images.dtype == dtype
        assert batch.images.is_contiguous(memory_format=layout)
        assert batch.labels.dtype == torch.int64


def test_upload_of_a_file_in_slabs(images, tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "SLAB", 4)
    images.tofile(tmp_path / "pixels")
    mapped = np.memmap(tmp_path / "pixels", np.uint8, "r", shape=images.shape)
    assert np.array_equal(upload(mapped, DEVICE).cpu(), images)


@pytest.mark.parametrize("others", [{}, {"balance": LABELS[ROWS], "channels_last": False}], ids=str)
def test_batches_made_inside_the_step_train_alike(images, others):
    """Bit for bit, in a graph too; the last batch has another size and runs without it."""
    options = {"augment": "strong", "shuffle": True, **others}
    runs = []
    for graph in (None, Rerun()):
        _, loader = both(images, **options)
        inside = graph is not None
        run = training(
            model=micro_resnet().to(DEVICE),
            total=4,
            mixup_alpha=0.4,
            cutmix_alpha=1.0,
            make_batch=loader.make if inside else None,
        )
        if inside:
            run.run_step = CapturedStep(run.step, graph)
            loader = ViewLoader(loader)
        assert len(loader) == 2
        found = [step for epoch in (1, 2) for step in steps(run, loader, epoch)]
        assert [step.images for step in found] == [3, 4, 3, 4]
        runs.append((found, snapshot(run)))
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])
    assert graph.replays == 2
    assert [tuple(t.shape) for t in run.run_step._inputs] == [(2, 3), (), (3,), (), (4,)]


def test_a_bad_batch_made_inside_names_its_rows(images):
    _, loader = both(images)
    run = training(model=micro_resnet().to(DEVICE), make_batch=loader.make)
    run.model.fc.bias.data.fill_(torch.nan)
    with pytest.raises(NonFiniteLoss) as caught:
        steps(run, ViewLoader(loader))
    assert caught.value.indices == ROWS[:3].tolist()


def given(images, val=(0, 4, 6, 9)) -> Inputs:
    photos = SimpleNamespace(labels=LABELS)
    return Inputs(images, photos, SimpleNamespace(train=ROWS, val=np.array(val, dtype=int)))


def test_make_loaders_takes_the_pixels_when_it_has_them(images):
    config = DEFAULT.__class__(
        data=DEFAULT.data.__class__(image_size=21, val_scale=1.0, workers=0),
        optim=DEFAULT.optim.__class__(batch_size=3, val_batch_size=2),
    )
    cpu = torch.device("cpu")
    threads = make_loaders(given(images), config, torch.float32, cpu)
    ours = make_loaders(given(images), config, torch.float32, cpu, torch.from_numpy(images))
    assert [type(loader) for loader in (*threads, *ours)] == [Loader] * 2 + [ResidentLoader] * 2
    for a, b in zip(threads, ours, strict=True):
        for x, y in zip(a.epoch(3), b.epoch(3), strict=True):
            assert torch.equal(x.indices, y.indices)
            assert torch.equal(x.labels, y.labels)
            assert (x.images - y.images).abs().mean() < 0.02
    pixels = torch.from_numpy(images)
    assert make_loaders(given(images, ()), config, torch.float32, cpu, pixels)[1] is None


def test_pixels_stay_on_the_gpu_only_where_they_fit(images, monkeypatch):
    memory = 4 * images.nbytes
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory)
    )
    pixels, reason = resident_pixels(given(images), DEVICE, "triton")
    assert np.array_equal(pixels.cpu(), images)
    assert "stay there" in reason
    memory -= 1
    pixels, reason = resident_pixels(given(images), DEVICE, "triton")
    assert pixels is None
    assert "more than a quarter of the GPU's" in reason
    assert resident_pixels(given(images), DEVICE, "eager") == (
        None,
        "the backend eager does not use the kernels",
    )

    def full(*_):
        raise torch.OutOfMemoryError

    memory += 1
    monkeypatch.setattr(inputs, "upload", full)
    pixels, reason = resident_pixels(given(images), DEVICE, "triton")
    assert pixels is None
    assert "free" in reason


@pytest.mark.gpu
def test_a_graph_that_makes_its_batches_never_waits(images):
    _, loader = both(images, augment="strong", dtype=torch.bfloat16)
    model = set_backend(micro_resnet(), "triton").to(DEVICE, memory_format=torch.channels_last)
    options = {"amp_dtype": torch.bfloat16, "mixup_alpha": 0.2, "fused": True, "cuda_graph": True}
    run = training(model=model, total=8, make_batch=loader.make, **options)
    steps(run, ViewLoader(loader))  # captures, and runs the last batch without the graph
    assert run.run_step.reason is None
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [b for epoch in (2, 3, 4) for b in ViewLoader(loader).epoch(epoch)]
        underway = [run.train_step(b, 2, n) for n, b in enumerate(batches[::2], start=1)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(np.isfinite(run.finish(step).loss) for step in underway)
    assert run.graph_steps()["replayed"] == 4


@pytest.mark.gpu
def test_making_batches_never_waits_for_the_gpu(images):
    _, ours = both(images, augment="strong", shuffle=True)
    list(ours.epoch(1))  # kernels compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(ours.epoch(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(tensor.is_cuda for batch in batches for tensor in batch)


def test_a_step_that_makes_its_batches_is_captured_anew_when_their_size_grows(images):
    runs = []
    for graph in (None, Rerun()):
        _, loader = both(images, image_size=(16, 21), augment="strong", shuffle=True)
        make = loader.make if graph else None
        run = training(model=micro_resnet().to(DEVICE), total=4, make_batch=make)
        if graph:
            run.run_step = CapturedStep(run.step, graph)
            loader = ViewLoader(loader)
        found = []
        for epoch in (1, 2):
            run.begin(epoch, loader.size_at(epoch))
            found += steps(run, loader, epoch)
        runs.append((found, snapshot(run)))
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])
    assert run.run_step.graph is not graph
    assert (run.run_step.replayed, graph.replays) == (2, 1)

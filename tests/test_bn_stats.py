"""bn_stats against float64: precision far from zero, the merge of partials, determinism."""

import pytest
import torch

from kernels import bn_stats
from kernels.bn_stats import FOLD_ABOVE, Tile, batch_statistics, merge, track
from kernels.launch import record, runs_triton
from kernels.shapes import EDGES, STAGES
from tests.helpers import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned")


def truth(x):
    var, mean = torch.var_mean(x.double().cpu(), dim=(0, 2, 3), correction=0)
    return mean, var


def assert_statistics(found, x, eps=1e-5):
    mean, var = truth(x)
    std = (var + eps).sqrt()
    assert found.dtype == torch.float32
    found = found.double().cpu()
    assert ((found[0] - mean).abs() <= 1e-6 * (std + mean.abs())).all()
    assert ((found[1] - var).abs() <= 1e-5 * (var + eps)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(dtype, generator):
    for shape in EDGES:
        x = (3 * torch.randn(shape, generator=generator) + 1).to(DEVICE, dtype)
        assert_statistics(batch_statistics(x, None)[:, 0], x)


@pytest.mark.parametrize("programs", [1, 2, 8])
def test_far_from_zero(programs, generator, monkeypatch):
    # several tiles a program, the last one short
    monkeypatch.setitem(bn_stats.TILES, 4, Tile(512, 4, programs))
    x = torch.randn((3, 40, 21, 23), generator=generator).to(DEVICE) + 100
    assert_statistics(batch_statistics(x, None)[:, 0], x)


def test_adversarial_channels(generator):
    x = torch.randn((2, 8, 40, 60), generator=generator)
    x[:, 1] = 7.25  # constant
    x[:, 2] = 0.0
    x[:, 3] *= 1e15
    x[:, 4] *= 1e-30
    x[:, 5] = 0.0
    x[0, 5, 0, 0] = 1e4  # an outlier first
    x[:, 6] = torch.arange(2 * 40 * 60).view(2, 40, 60) - 1e3  # drifts
    x = x.to(DEVICE)
    found = batch_statistics(x, None)[:, 0]
    assert_statistics(found, x)
    assert found[1, 1] == found[1, 2] == 0
    assert found[0, 1] == 7.25


def test_two_tensors_at_once(generator):
    x, r = (torch.randn((2, 24, 9, 5), generator=generator).to(DEVICE) for _ in range(2))
    found = batch_statistics(x, 5 * r + 3)
    assert_statistics(found[:, 0], x)
    assert_statistics(found[:, 1], 5 * r + 3)


def test_any_layout_gives_the_same_bits(generator):
    x = torch.randn((2, 48, 9, 5), generator=generator).to(DEVICE)
    expected = batch_statistics(x.contiguous(memory_format=torch.channels_last), None)
    wide = torch.stack((x, x), dim=2).flatten(1, 2)[:, ::2]
    assert torch.equal(batch_statistics(x, None), expected)
    assert torch.equal(batch_statistics(wide, None), expected)


@pytest.mark.skipif(not runs_triton(torch.empty(0, device=DEVICE)), reason="needs Triton")
@pytest.mark.parametrize(("rows", "tiles"), [(16, 600), (4, FOLD_ABOVE + 77)])
def test_merges_the_tiles_of_a_convolution(rows, tiles, generator):
    # one partial a tile, more of them than the merge holds at once, a short last tile
    m, c = rows * tiles + rows - 1, 12
    x = torch.randn((m, c), generator=generator) + 50
    x[:, 3] = 7.25
    split = x.double().split(rows)
    means = torch.stack([t.mean(0) for t in split])
    m2 = torch.stack([((t - t.mean(0)) ** 2).sum(0) for t in split])
    partials = torch.stack((means, m2)).float().to(DEVICE)
    found = merge(partials, m, rows)
    assert_statistics(found, x.t()[None, :, :, None])
    assert found[0, 3] == 7.25
    assert found[1, 3] == 0
    assert torch.equal(merge(partials, m, rows), found)


def test_many_tiles_are_folded_first():
    partials = torch.empty((2, 12544, 64), device="meta")
    with record() as recording:
        merge(partials, 12544 * 128, 128)
    fold, merging = recording.launches
    assert fold.grid[0] >= 132
    assert merging.args[0].shape[1] < 512
    # partials of several tiles each cannot be: their rows are not where folded ones would lie
    with record() as recording:
        merge(partials, 2 * 12544 * 128, 128)
    assert len(recording.launches) == 1


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_tracks_as_batch_norm(momentum, generator):
    norm = torch.nn.BatchNorm2d(1030, momentum=momentum)  # more channels than a step takes
    buffers = [buffer.clone().to(DEVICE) for buffer in norm.buffers()]
    for _ in range(3):
        x = 3 * torch.randn((2, 1030, 2, 3), generator=generator) + 1
        norm(x)
        var, mean = torch.var_mean(x.to(DEVICE), (0, 2, 3), correction=0)
        track(*buffers, mean, var, 12, momentum)
    for ours, theirs in zip(buffers, norm.buffers(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-6, atol=1e-6)
    assert buffers[2] == 3


def test_without_triton_tracking_is_the_formula(generator, monkeypatch):
    def run(momentum):
        drawn = torch.rand((4, 8), generator=generator.manual_seed(5)).to(DEVICE)
        batches = torch.tensor(4, device=DEVICE)
        track(drawn[0], drawn[1], batches, drawn[2], drawn[3], 7, momentum)
        return drawn, batches

    for momentum in (0.3, None):
        expected, _ = run(momentum)
        with monkeypatch.context() as patch:
            patch.setattr(bn_stats, "runs_triton", lambda tensor: False)
            found, batches = run(momentum)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        assert batches == 5


def test_tracking_is_one_launch():
    c = torch.empty(512, device="meta")
    with record() as recording:
        bn_stats.move(c, c, torch.empty((), dtype=torch.int64, device="meta"), c, c, 1.0, None)
    assert len(recording.launches) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 1}, "more than one value"),
        ({"mean": torch.ones(4)}, r"mean must be float32 \[C\], not torch.float32 \(4,\)"),
        ({"running_var": torch.ones(8).half()}, "running_var must be float32"),
        ({"running_mean": torch.ones(16)[::2]}, "must be contiguous"),
        ({"num_batches_tracked": torch.ones(())}, "must be one int64"),
    ],
)
def test_tracking_names_bad_input(change, message):
    names = ("running_mean", "running_var", "mean", "var")
    inputs = {name: torch.ones(8, device=DEVICE) for name in names}
    inputs |= {"num_batches_tracked": torch.tensor(0), "count": 6, "momentum": 0.1}
    with pytest.raises(ValueError, match=message):
        track(**inputs | change)


def test_empty_batch_is_zero():
    assert not batch_statistics(torch.empty(0, 8, 4, 4, device=DEVICE), None).any()


def test_opcheck(generator):
    x = torch.randn((2, 8, 3, 5), generator=generator).to(DEVICE)
    torch.library.opcheck(batch_statistics, (x, None))
    torch.library.opcheck(batch_statistics, (x, x + 1))
    c = [torch.rand(8, generator=generator).to(DEVICE) for _ in range(4)]
    batches = torch.tensor(3, device=DEVICE)
    torch.library.opcheck(bn_stats._track_op, (c[0], c[1], batches, c[2], c[3], 1.5, 0.1))


def test_enough_programs_on_132_multiprocessors():
    for shape in STAGES:
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        with record() as recording:
            bn_stats.statistics(x)
        stats, merging = recording.launches
        assert stats.grid[0] >= 132
        assert merging.grid[0] >= 8

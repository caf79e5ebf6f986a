"""bn_stats against float64: precision far from zero, the merge of partials, determinism."""

import pytest
import torch

from kernels import bn_stats
from kernels.bn_stats import Tile, batch_statistics, merge
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
def test_merges_the_tiles_of_a_convolution(generator):
    # one partial a tile of 16 rows, more partials than the merge holds at once, a short last tile
    rows, m, c = 16, 16 * 600 + 5, 12
    x = torch.randn((m, c), generator=generator) + 50
    tiles = x.split(rows)
    means = torch.stack([t.double().mean(0) for t in tiles])
    m2 = torch.stack([((t - t.double().mean(0)) ** 2).sum(0) for t in tiles])
    found = merge(torch.stack((means, m2)).float().to(DEVICE), m, rows)
    assert_statistics(found, x.t()[None, :, :, None])


def test_empty_batch_is_zero():
    assert not batch_statistics(torch.empty(0, 8, 4, 4, device=DEVICE), None).any()


def test_opcheck(generator):
    x = torch.randn((2, 8, 3, 5), generator=generator).to(DEVICE)
    torch.library.opcheck(batch_statistics, (x, None))
    torch.library.opcheck(batch_statistics, (x, x + 1))


def test_enough_programs_on_132_multiprocessors():
    for shape in STAGES:
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        with record() as recording:
            bn_stats.statistics(x)
        stats, merging = recording.launches
        assert stats.grid[0] >= 132
        assert merging.grid[0] >= 8

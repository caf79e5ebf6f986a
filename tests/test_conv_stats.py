"""conv_stats against float64: product, statistics, gradients, op contracts, bad inputs."""

import importlib
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels import bn_passes, launch
from kernels.bn_checks import Norm
from kernels.bn_stats import FOLD_ABOVE
from kernels.conv_gemm import FLOAT32, NARROW, SITES, SMALL_WIDE, WIDE, tiles_for
from kernels.conv_prologue import Normed
from kernels.conv_stats import SPEC, _op, conv_stats, forward, reference
from kernels.launch import record
from kernels.shapes import conv_out
from tests.helpers import (
    CONV_SHAPES,
    DEVICE,
    DTYPES,
    LAYOUTS,
    as_float64,
    assert_relative_l2,
    assert_two_errors,
    check_against_float64,
    fresh,
)

EPS = 1e-5
conv_stats_module = importlib.import_module("kernels.conv_stats")
pytestmark = pytest.mark.usefixtures("poisoned", "exact_float32")


def assert_statistics(y, mean, var):
    """kernels.md: mean within 1e-6 std (1 + |mean|/std), var + eps within 1e-5, in float64."""
    true_var, true_mean = torch.var_mean(y.double().cpu(), (0, 2, 3), correction=0)
    std = true_var.sqrt()
    assert mean.dtype == var.dtype == torch.float32
    bound = 1e-6 * (std + true_mean.abs()) + torch.finfo(torch.float32).tiny
    assert ((mean.cpu() - true_mean).abs() <= bound).all()
    assert ((var.cpu() - true_var).abs() <= 1e-5 * (true_var + EPS)).all()


def check_stats(inputs):
    """Numbers, statistics and gradients of conv_stats; returns y."""
    dtype = inputs["x"].dtype
    y, mean, var = conv_stats(**fresh(inputs))
    truth = reference(**as_float64(inputs))[0].detach()
    assert_relative_l2(y, truth)
    assert_two_errors(y, reference(**inputs)[0], truth, "y")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == dtype
    assert_statistics(y.detach(), mean, var)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
def test_training_matches_float64(shape, dtype, generator):
    inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
    check_stats(inputs)
    check_against_float64(conv_stats, reference, inputs, generator)


def test_random_shapes(generator):
    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(12):
        r, stride = draw(1, 5), draw(1, 3)
        h, w = draw(r, 9), draw(r, 9)
        c = (3, 8, 16, 40)[draw(0, 3)]
        shape = (draw(1, 5), c, h, w, 8 * draw(1, 10), r, stride, draw(0, r))
        print(shape)
        check_stats(SPEC.make_inputs(shape, DTYPES[draw(0, 2)], DEVICE, generator))


@pytest.mark.parametrize("tile", dict.fromkeys((*WIDE, *NARROW, *SMALL_WIDE, *FLOAT32)), ids=str)
def test_every_tile(tile, generator):
    """More than one tile each way, the last ones partly filled."""
    inputs = SPEC.make_inputs((2, 24, 13, 12, 136, 3, 1, 1), torch.float16, DEVICE, generator)
    x, weight = inputs["x"].detach(), inputs["weight"].detach()
    y, statistics = forward(x, weight, 1, 1, tile)
    truth = reference(x.double().cpu(), weight.double().cpu(), 1, 1)[0]
    assert_relative_l2(y, truth)
    assert_statistics(y, *statistics)


def test_statistics_of_adversarial_channels(generator):
    """mean/std = 100, a constant, a huge, a dead and a subnormal channel, in one tensor."""
    x = torch.randn(4, 8, 12, 11, generator=generator)
    x[:, 0] += 100
    x[:, 1] = 3.25
    x[:, 2] *= 1e15
    x[:, 3] = 0
    x[:, 4] *= 1e-40
    weight = torch.eye(8).view(8, 8, 1, 1)
    y, mean, var = conv_stats(x.to(DEVICE), weight.to(DEVICE))
    assert_statistics(y, mean, var)
    assert var[1] == var[3] == mean[3] == 0
    assert mean[1] == 3.25


def test_statistics_are_those_of_the_rounded_output(generator):
    """bfloat16 keeps eighths at 30: the rounded values' variance is 1 % from the sums'.

    The mean is 100 standard deviations from zero, as far as the variance is promised to 1e-5.
    """
    x = (30 + 0.3 * torch.randn(2, 8, 9, 9, generator=generator)).bfloat16().to(DEVICE)
    weight = torch.eye(8, device=DEVICE).view(8, 8, 1, 1) * 1.0078125
    y, mean, var = conv_stats(x, weight.bfloat16())
    assert_statistics(y, mean, var)


def test_statistics_repeat_bit_for_bit(generator):
    inputs = SPEC.make_inputs((3, 16, 14, 13, 16, 3, 1, 1), torch.float16, DEVICE, generator)
    first, second = conv_stats(**inputs), conv_stats(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_padding_is_zero_not_a_neighbour(generator):
    """Ones everywhere: an output counts the taps inside the image, whatever lies beside them."""
    x, weight = torch.ones(2, 8, 5, 6, device=DEVICE), torch.ones(8, 8, 3, 3, device=DEVICE)
    y, _, _ = conv_stats(x, weight, stride=2, padding=2)
    assert torch.equal(y, F.conv2d(x, weight, stride=2, padding=2))


def test_infinite_pixel_stays_in_its_window():
    """Masked channels and columns past the last filter must not touch other memory: 0 * inf."""
    x = torch.ones(1, 24, 6, 6, device=DEVICE)
    x[0, 0, 5, 5] = math.inf
    y, _, _ = conv_stats(x, torch.ones(8, 24, 3, 3, device=DEVICE), padding=1)
    assert torch.isinf(y[:, :, 4:, 4:]).all()
    assert torch.isfinite(y[:, :, :4]).all()
    assert torch.isfinite(y[:, :, :, :4]).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_in_any_layout(layout, generator):
    inputs = SPEC.make_inputs((2, 8, 7, 5, 16, 3, 2, 1), torch.float32, DEVICE, generator)
    check_against_float64(conv_stats, reference, inputs, generator, atol=1e-6, layout=layout)


def test_stride_zero_gradient_and_only_what_is_needed(generator):
    inputs = SPEC.make_inputs((2, 3, 7, 5, 8, 3, 2, 1), torch.float32, DEVICE, generator)
    inputs["x"] = inputs["x"].detach()
    conv_stats(**inputs)[0].sum().backward()
    ours, inputs["weight"].grad = inputs["weight"].grad, None
    reference(**inputs)[0].sum().backward()
    assert inputs["x"].grad is None
    assert torch.allclose(ours, inputs["weight"].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [CONV_SHAPES[0], CONV_SHAPES[4]], ids=str)
def test_our_own_weight_gradient(shape, generator, monkeypatch):
    """For images too; the gradient of x stays ATen's."""
    made, ours = [], conv_stats_module.conv_wgrad
    monkeypatch.setattr(
        conv_stats_module, "conv_wgrad", lambda *a, **o: made.append(ours(*a, **o)) or made[-1]
    )
    inputs = SPEC.make_inputs(shape, torch.float16, DEVICE, generator)
    check_against_float64(
        partial(conv_stats, own_wgrad=True), reference, inputs, generator, atol=1e-6
    )
    (dw,) = made
    assert dw.dtype == torch.float32
    assert dw.shape == inputs["weight"].shape


def test_statistics_take_no_gradient(generator):
    inputs = SPEC.make_inputs((2, 8, 4, 4, 8, 1, 1, 0), torch.float32, DEVICE, generator)
    y, mean, var = conv_stats(**inputs)
    assert y.requires_grad
    assert not mean.requires_grad
    assert not var.requires_grad


def test_accepts_nchw_slices_and_float32_weight(generator):
    x = torch.randn(2, 16, 6, 7, generator=generator).to(DEVICE, torch.float16)[:, ::2, :, 1:]
    weight = torch.randn(8, 8, 3, 3, generator=generator).to(DEVICE).requires_grad_()
    y, _, _ = conv_stats(x, weight, padding=1)
    dense = reference(x.double().cpu(), weight.detach().half().double().cpu(), 1, 1)[0]
    assert_relative_l2(y, dense)
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_autocast_decides_the_dtype(generator):
    inputs = SPEC.make_inputs((2, 8, 4, 4, 8, 3, 1, 1), torch.float32, DEVICE, generator)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y, mean, _ = conv_stats(**inputs)
    assert (y.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
    y.float().sum().backward()
    assert inputs["x"].grad.dtype == inputs["weight"].grad.dtype == torch.float32


def test_empty_batch():
    x = torch.empty(0, 8, 5, 5, device=DEVICE, requires_grad=True)
    weight = torch.ones(16, 8, 3, 3, device=DEVICE, requires_grad=True)
    y, mean, var = conv_stats(x, weight, stride=2, padding=1)
    y.sum().backward()
    assert y.shape == (0, 16, 3, 3)
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(mean, var)
    assert torch.equal(mean, torch.zeros(16, device=DEVICE))


def test_offsets_beyond_31_bits(generator, tmp_path):
    """The third image starts at element 2.3e9; only the pages that are touched exist."""
    n, size, step = 3, 12000, 6000
    count = n * size * size * 8
    if DEVICE.type == "cuda":
        memory = torch.zeros(count, dtype=torch.float16, device=DEVICE)
    else:
        memory = torch.from_file(
            str(tmp_path / "sparse"), shared=True, size=count, dtype=torch.float16
        )
    x = memory.view(n, size, size, 8).permute(0, 3, 1, 2)
    x[:, :, ::step, ::step] = torch.randn(n, 8, 2, 2, generator=generator).half().to(DEVICE)
    weight = torch.eye(8, device=DEVICE).half().view(8, 8, 1, 1)
    y, _ = forward(x, weight, step, 0)
    assert torch.equal(y, x[:, :, ::step, ::step])


def test_opcheck(generator):
    for shape in (CONV_SHAPES[0], CONV_SHAPES[4]):
        inputs = SPEC.make_inputs(shape, torch.float32, DEVICE, generator)
        torch.library.opcheck(_op, tuple(inputs.values()))
    torch.library.opcheck(_op, (*inputs.values(), True))


def test_torch_compile_goes_through(generator):
    inputs = SPEC.make_inputs((2, 8, 5, 5, 8, 3, 1, 1), torch.float32, DEVICE, generator)

    def step(x, weight):
        y, mean, var = conv_stats(x * 2, weight, padding=1)
        return (y - mean.view(-1, 1, 1)) * (var + EPS).rsqrt().view(-1, 1, 1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, weight = inputs["x"], inputs["weight"]
    y = compiled(x, weight)
    with torch.no_grad():
        expected = F.batch_norm(F.conv2d(x * 2, weight, padding=1), None, None, training=True)
        assert torch.allclose(y, expected, atol=1e-5)
    y.sum().backward()
    ours = x.grad
    x.grad = None
    step(x, weight).sum().backward()
    assert torch.allclose(ours, x.grad, atol=1e-5)


X, WEIGHT = torch.zeros(2, 8, 5, 5), torch.zeros(16, 8, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 12, 5, 5), "weight": torch.zeros(16, 12, 3, 3)}, "multiple of 8 ch"),
        ({"weight": torch.zeros(16, 4, 3, 3)}, "grouped convolutions"),
        ({"weight": torch.zeros(12, 8, 3, 3)}, "multiple of 8 filters"),
        ({"weight": torch.zeros(16, 8, 7, 7)}, "7x7 is larger than x 5x5"),
        ({"weight": torch.zeros(16, 8)}, r"\[K, C, R, S\]"),
        ({"weight": WEIGHT.to("meta")}, "one device"),
        ({"x": torch.zeros(8, 5, 5)}, r"\[N, C, H, W\]"),
        ({"x": X.double()}, "not torch.float64"),
        ({"stride": 0}, "stride 0"),
        ({"padding": -1}, "padding -1"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        conv_stats(**{"x": X, "weight": WEIGHT, **change})


def test_without_triton_the_references_answer(generator, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    inputs = SPEC.make_inputs(
        (2, 3, 6, 6, 8, 3, 2, 1), torch.float32, torch.device("cpu"), generator
    )
    expected = reference(**inputs)
    for ours, theirs in zip(conv_stats(**inputs), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_table_sites_are_recorded_as_planned():
    """Every site: one convolution and one merge; the stem packs its image and its filters first
    and folds its many tiles. The programs cover the output."""
    for shape in SITES:
        n, c, h, w, k, r, stride, padding = shape
        x = torch.empty(n, c, h, w, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(k, c, r, r, dtype=torch.bfloat16, device="meta")
        pack = ["_pack_kernel"] * 2 if c == 3 else []
        for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
            with record(capability) as recording:
                forward(x, weight, stride, padding)
            names = [launched.kernel.__name__ for launched in recording.launches]
            conv = recording.launches[len(pack)]
            rows = n * conv_out(h, r, stride, padding) * conv_out(w, r, stride, padding)
            merges = 2 if math.ceil(rows / conv.options["BLOCK_M"]) > FOLD_ABOVE else 1
            assert names == [*pack, "_conv_kernel", *["_merge_kernel"] * merges]
            assert merges == (2 if c == 3 else 1)
            assert conv.grid[0] == math.ceil(rows / conv.options["BLOCK_M"]) * math.ceil(
                k / conv.options["BLOCK_N"]
            )


def test_small_shared_memory_has_its_own_tiles():
    for capability in ((8, 6), (8, 9), (12, 0)):
        for filters in (64, 512):
            for tile in tiles_for(capability, filters, torch.bfloat16):
                operands = (tile.block_m + tile.block_n) * tile.block_k * 2
                assert tile.stages * operands <= 99 * 1024


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_prologue_is_the_stored_activation(act, dtype, generator):
    """Bit for bit what the convolution of `bn_passes.forward`'s output gives, padding included: it
    is zero, not act(bias)."""
    for shape in (CONV_SHAPES[4], CONV_SHAPES[5], CONV_SHAPES[8]):
        inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
        x, weight = inputs["x"].detach(), inputs["weight"].detach()
        channels = (torch.rand(4, x.shape[1], generator=generator) + 0.5).to(DEVICE)
        norm = Norm(*channels, EPS)
        steps = (inputs["stride"], inputs["padding"])
        stored = bn_passes.forward(x, norm, None, None, act)[0]
        expected = forward(stored, weight, *steps)
        for ours, theirs in zip(
            forward(Normed(x, norm, act), weight, *steps), expected, strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_is_added_before_the_statistics(dtype, generator):
    """Rounded once, and the statistics are those of the sum, with a prologue too."""
    for shape in (CONV_SHAPES[3], CONV_SHAPES[4], CONV_SHAPES[7]):
        inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
        x, weight = inputs["x"].detach(), inputs["weight"].detach()
        steps = (inputs["stride"], inputs["padding"])
        norm = Norm(*(torch.rand(4, x.shape[1], generator=generator) + 0.5).to(DEVICE), EPS)
        stored = bn_passes.forward(x, norm, None, None, "relu")[0]
        for h, read in ((x, x), (Normed(x, norm, "relu"), stored)):
            exact = F.conv2d(read.double(), weight.double(), None, *steps)
            residual = torch.randn(exact.shape, generator=generator).to(DEVICE, dtype)
            y, statistics = forward(h, weight, *steps, residual=residual)
            assert_relative_l2(y, exact + residual.double())
            assert_statistics(y, *statistics)

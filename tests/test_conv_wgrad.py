"""conv_wgrad against float64: every shape, part and prologue, op contracts, bad inputs."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import bn_passes, launch
from kernels.activation import ACTS, REFERENCE
from kernels.bn_checks import Norm
from kernels.conv_prologue import Gradient, Normed
from kernels.conv_wgrad import (
    FLOAT32,
    NARROW,
    SITES,
    SMALL_NARROW,
    SMALL_WIDE,
    SPEC,
    WIDE,
    _op,
    conv_wgrad,
    parts_for,
    reference,
    tile_for,
    weight_gradient,
)
from kernels.launch import record
from kernels.shapes import conv_out
from tests.helpers import CONV_SHAPES, DEVICE, DTYPES, as_float64, assert_relative_l2

EPS = 1e-5
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-4, torch.float16: 2e-4}
pytestmark = pytest.mark.usefixtures("poisoned", "exact_float32")


def draw_inputs(shape, dtype, generator):
    return SPEC.make_inputs(shape, dtype, DEVICE, generator)


def check(inputs, **options):
    """The launcher's numbers, dtype and layout; returns dW."""
    dw = weight_gradient(*inputs.values(), **options)
    truth = reference(**as_float64(inputs))
    assert dw.shape == truth.shape
    assert dw.dtype == torch.float32
    assert dw.is_contiguous(memory_format=torch.channels_last)
    assert_relative_l2(dw, truth, BOUND[inputs["x"].dtype])
    return dw


def normed(x, act, generator):
    """A Normed of x with every channel another norm, and h itself in plain PyTorch."""
    c = x.shape[1]
    weight, bias, mean = (torch.randn(c, generator=generator) + 0.5 for _ in range(3))
    var = torch.rand(c, generator=generator) + 0.2
    columns = [p.view(-1, 1, 1) for p in (weight * torch.rsqrt(var + EPS), bias, mean)]
    z = ((x.float().cpu() - columns[2]) * columns[0] + columns[1]).to(x.dtype)
    h = REFERENCE[act](z.float()).to(x.dtype).to(DEVICE)
    norm = Norm(*(p.to(DEVICE) for p in (weight, bias, mean, var)), EPS)
    return Normed(x, norm, act), h


def gradient(dz, generator):
    """A Gradient that starts from dz, and dy itself in plain PyTorch."""
    k = dz.shape[1]
    x = torch.randn(dz.shape, generator=generator).to(dz.dtype)
    mean, coefficients = torch.randn(k, generator=generator), torch.randn(3, k, generator=generator)
    a, b, c = coefficients.view(3, -1, 1, 1)
    dy = a * dz.float().cpu() + b * (x.float() - mean.view(-1, 1, 1)) + c
    made = Gradient(dz, x.to(DEVICE), mean.to(DEVICE), coefficients.to(DEVICE))
    return made, dy.to(dz.dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
def test_matches_float64(shape, dtype, generator):
    inputs = draw_inputs(shape, dtype, generator)
    assert torch.equal(conv_wgrad(**inputs), check(inputs))


def test_reference_is_what_autograd_says(generator):
    inputs = as_float64(draw_inputs((2, 8, 9, 7, 16, 3, 2, 1), torch.float32, generator))
    weight = torch.zeros(16, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    F.conv2d(inputs["x"], weight, stride=2, padding=1).backward(inputs["dy"])
    assert torch.allclose(reference(**inputs), weight.grad, rtol=1e-12, atol=1e-12)


def test_random_shapes(generator):
    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(12):
        r, stride = draw(1, 5), draw(1, 3)
        c = (3, 8, 16, 40)[draw(0, 3)]
        h, w = draw(r, 9), draw(r, 9)
        shape = (draw(1, 5), c, h, w, 8 * draw(1, 10), r, stride, draw(0, r))
        parts = draw(1, 4)
        print(shape, parts)
        check(draw_inputs(shape, DTYPES[draw(0, 2)], generator), parts=parts)


def test_filters_higher_than_wide(generator):
    for x_size, dy_size, kernel_size in (
        ((2, 16, 7, 9), (2, 8, 7, 5), (3, 7)),
        ((2, 3, 7, 9), (2, 8, 7, 9), (5, 5)),
        ((2, 3, 8, 9), (2, 8, 9, 5), (4, 9)),
    ):
        dy, x = (torch.randn(size, generator=generator).to(DEVICE) for size in (dy_size, x_size))
        padding = (dy_size[2] - 1 + kernel_size[0] - x_size[2]) // 2
        check({"dy": dy, "x": x, "kernel_size": kernel_size, "stride": 1, "padding": padding})


@pytest.mark.parametrize("tile", [WIDE, NARROW, SMALL_WIDE, SMALL_NARROW, FLOAT32], ids=str)
def test_every_tile(tile, generator):
    """More than one tile each way, the last ones partly filled, over parts of unequal length."""
    inputs = draw_inputs((2, 24, 13, 12, 136, 3, 1, 1), torch.float16, generator)
    check(inputs, tile=tile, parts=3)


def test_number_of_parts(generator):
    """One part is dW itself; parts without a pixel are left out; a repetition is bit for bit."""
    inputs = draw_inputs((3, 8, 7, 6, 16, 3, 1, 1), torch.float32, generator)
    for parts in (1, 2, 5, 8, 1000):
        dw = check(inputs, parts=parts)
        assert torch.equal(dw, weight_gradient(*inputs.values(), parts=parts))
        with record() as recording:
            weight_gradient(*inputs.values(), parts=parts)
        convolved, *summed = recording.launches
        assert len(summed) == (parts > 1)
        assert convolved.grid[0] <= math.ceil(3 * 7 * 6 / FLOAT32.block_m) * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 24, 9, 7, 72, 3, 2, 1), (3, 64, 5, 6, 16, 3, 1, 1), (1, 40, 7, 5, 24, 1, 2, 0)],
    ids=str,
)
def test_prologues(shape, dtype, generator):
    """Both, and each alone: the same bits as from what they stand for, which PyTorch made."""
    inputs = draw_inputs(shape, dtype, generator)
    made_h, h = normed(inputs["x"], "relu", generator)
    made_dy, dy = gradient(inputs["dy"], generator)
    rest = (inputs["kernel_size"], inputs["stride"], inputs["padding"])
    truth = reference(dy.double().cpu(), h.double().cpu(), *rest)
    for ours in (dy, made_dy):
        for other in (h, made_h):
            assert_relative_l2(weight_gradient(ours, other, *rest), truth, BOUND[dtype])


def test_prologue_over_a_stored_image(generator):
    inputs = draw_inputs((2, 3, 11, 9, 8, 7, 2, 3), torch.float16, generator)
    made_dy, inputs["dy"] = gradient(inputs["dy"], generator)
    dw = weight_gradient(made_dy, *list(inputs.values())[1:])
    assert_relative_l2(dw, reference(**as_float64(inputs)), BOUND[torch.float16])


@pytest.mark.parametrize("act", ACTS)
def test_prologue_makes_the_bits_the_forward_stored(act, generator):
    inputs = draw_inputs((2, 16, 6, 5, 8, 3, 1, 1), torch.bfloat16, generator)
    made_h, _ = normed(inputs["x"], act, generator)
    h, _ = bn_passes.forward(inputs["x"], made_h.norm, None, None, act)
    rest = ((3, 3), 1, 1)
    stored, made = (weight_gradient(inputs["dy"], one, *rest) for one in (h, made_h))
    assert torch.equal(made, stored)


def test_rounded_to_the_weights_dtype(generator):
    for shape in ((2, 16, 6, 5, 8, 3, 1, 1), (2, 3, 6, 5, 8, 3, 1, 1)):
        inputs = draw_inputs(shape, torch.bfloat16, generator)
        for parts in (1, 2):
            dw = weight_gradient(*inputs.values(), dtype=torch.bfloat16, parts=parts)
            assert torch.equal(dw, weight_gradient(*inputs.values(), parts=parts).bfloat16())


def test_padding_is_zero_not_a_neighbour(generator):
    """Ones everywhere: an element counts the pixels its tap finds inside the image."""
    dy, x = torch.ones(2, 8, 4, 4, device=DEVICE), torch.ones(2, 8, 5, 6, device=DEVICE)
    dw = conv_wgrad(dy, x, (3, 3), stride=2, padding=2)
    assert torch.equal(dw, reference(dy, x, (3, 3), 2, 2))


@pytest.mark.filterwarnings("ignore:invalid value")  # of products that are not stored
def test_infinite_pixel_stays_in_its_taps():
    """Masked columns, filters and rows past the last must not touch other memory: 0 * inf."""
    x, dy = torch.ones(1, 24, 6, 6, device=DEVICE), torch.ones(1, 8, 6, 6, device=DEVICE)
    x[0, 3, 5, 5] = math.inf
    dw = conv_wgrad(dy, x, (3, 3), padding=1)
    assert torch.isinf(dw[:, 3, 1:, 1:]).all()
    dw[:, 3, 1:, 1:] = 0
    assert torch.isfinite(dw).all()
    dy[0, 2, 5, 5] = math.inf
    dw = conv_wgrad(dy, torch.ones_like(x), (3, 3), padding=1)
    assert torch.isinf(dw[2, :, :2, :2]).all()
    dw[2] = 0
    assert torch.isfinite(dw).all()


@pytest.mark.parametrize(
    "layout",
    [
        lambda dy: dy.contiguous(),
        lambda dy: dy[:1, :1, :1, :1].expand(dy.shape),
        lambda dy: dy.flip(3),
    ],
    ids=["nchw", "expanded", "flipped"],
)
def test_gradient_in_any_layout(layout, generator):
    inputs = draw_inputs((2, 8, 7, 5, 16, 3, 2, 1), torch.float32, generator)
    check({**inputs, "dy": layout(inputs["dy"])})


def test_accepts_slices(generator):
    inputs = draw_inputs((2, 16, 6, 7, 16, 3, 1, 1), torch.float16, generator)
    check({**inputs, "x": inputs["x"][:, ::2], "dy": inputs["dy"][:, 8:]})


def test_empty_batch():
    x, dy = torch.empty(0, 8, 5, 5, device=DEVICE), torch.empty(0, 16, 3, 3, device=DEVICE)
    for dw in (conv_wgrad(dy, x, (3, 3), stride=2, padding=1), reference(dy, x, (3, 3), 2, 1)):
        assert torch.equal(dw, torch.zeros(16, 8, 3, 3, device=DEVICE))


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
    touched = torch.randn(n, 8, 2, 2, generator=generator).half().to(DEVICE)
    x[:, :, ::step, ::step] = touched
    dy = torch.randn(n, 16, 2, 2, generator=generator).half().to(DEVICE)
    dw = weight_gradient(dy, x, (1, 1), step, 0)
    truth = torch.einsum("nkpq,ncpq->kc", dy.double(), touched.double())
    assert_relative_l2(dw[:, :, 0, 0], truth, BOUND[torch.float16])


def test_opcheck(generator):
    for shape in (CONV_SHAPES[0], CONV_SHAPES[4]):
        inputs = draw_inputs(shape, torch.float32, generator)
        torch.library.opcheck(_op, tuple(inputs.values()))


def test_torch_compile_goes_through(generator):
    inputs = draw_inputs((2, 8, 5, 5, 8, 3, 1, 1), torch.float32, generator)

    def step(dy, x):
        return conv_wgrad(dy, x * 2, (3, 3), padding=1) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs["dy"], inputs["x"]), step(inputs["dy"], inputs["x"]))


DY, X = torch.zeros(2, 16, 5, 5), torch.zeros(2, 8, 5, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 12, 5, 5)}, "multiple of 8 channels"),
        ({"dy": torch.zeros(2, 12, 5, 5)}, "dy must have a multiple of 8"),
        ({"dy": torch.zeros(2, 16, 5, 4)}, r"must be \(2, 16, 5, 5\)"),
        ({"dy": torch.zeros(3, 16, 5, 5)}, r"must be \(2, 16, 5, 5\)"),
        ({"dy": DY.half()}, "dtype and device"),
        ({"dy": DY.to("meta")}, "dtype and device"),
        ({"x": X[0]}, r"x must be \[N, C, H, W\]"),
        ({"dy": DY[0]}, r"dy must be \[N, C, H, W\]"),
        ({"x": X.double(), "dy": DY.double()}, "not torch.float64"),
        ({"kernel_size": (0, 3)}, "kernel_size 0x3 does not fit"),
        ({"kernel_size": (9, 9)}, "9x9 does not fit x 5x5 with padding 1"),
        ({"stride": 0}, "stride 0"),
        ({"padding": -1}, "padding -1"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {"dy": DY, "x": X, "kernel_size": (3, 3), "stride": 1, "padding": 1}
    with pytest.raises(ValueError, match=message):
        conv_wgrad(**{**inputs, **change})


def test_without_triton_the_reference_answers(generator, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    inputs = SPEC.make_inputs(
        (2, 3, 6, 6, 8, 3, 2, 1), torch.float32, torch.device("cpu"), generator
    )
    with record() as recording:
        dw = conv_wgrad(**inputs)
    assert recording.launches == []
    assert torch.equal(dw, reference(**inputs))


def test_number_of_parts_ends_first():
    assert parts_for(132, 64000, 64, 132) == 1  # every multiprocessor has a tile
    assert parts_for(1, 64 * 1320, 64, 132) == 132
    assert parts_for(66, 64000, 64, 132) == 2
    assert parts_for(9, 4 * 64, 64, 132) == 1  # less work than adding parts
    assert parts_for(1, 64, 64, 132) == 1


@pytest.mark.parametrize("batch", [32, 256])
def test_table_sites_are_recorded_as_planned(batch):
    """Every site: its launches; most multiprocessors busy where a second kernel pays; partials
    that weigh little in a batch of 256."""
    for shape in SITES:
        _, c, h, w, k, r, stride, padding = shape
        p, q = conv_out(h, r, stride, padding), conv_out(w, r, stride, padding)
        x = torch.empty(batch, c, h, w, dtype=torch.bfloat16, device="meta")
        dy = torch.empty(batch, k, p, q, dtype=torch.bfloat16, device="meta")
        for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
            with record(capability) as recording:
                weight_gradient(dy, x, (r, r), stride, padding)
            names = [launched.kernel.__name__ for launched in recording.launches]
            grid = recording.launches[names.index("_wgrad_kernel")].grid[0]
            tile = tile_for(capability, k, x.dtype)
            columns = 7 * 32 if c == 3 else c * r * r
            tiles = math.ceil(k / tile.block_k) * math.ceil(columns / tile.block_n)
            parts = grid // tiles
            assert grid == tiles * parts
            pack = ["_pack_kernel"] if c == 3 else []
            assert names == [*pack, "_wgrad_kernel", *["_sum_kernel"] * (parts > 1)]
            assert parts == 1 or grid > 0.7 * 132
            # two operands a step against 8 bytes an element of the tile, once a program
            steps = batch * p * q / tile.block_m / parts
            loaded = steps * (tile.block_k + tile.block_n) * tile.block_m * 2
            partial = 8 * tile.block_k * tile.block_n if parts > 1 else 0
            assert batch == 32 or r == 1 or partial < 0.12 * loaded

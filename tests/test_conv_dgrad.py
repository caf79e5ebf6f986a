"""conv_dgrad against float64: every parity, prologue and epilogue, op contracts, bad inputs."""

import math
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from kernels import bn_passes, bn_sums, launch
from kernels.activation import ACTS
from kernels.bn_checks import Norm
from kernels.conv_dgrad import SPEC, Before, _op, conv_dgrad, data_gradient, reference
from kernels.conv_gemm import FLOAT32, NARROW, SITES, SMALL_WIDE, WIDE
from kernels.conv_prologue import Gradient
from kernels.launch import nhwc, record
from kernels.shapes import conv_out
from tests.helpers import (
    CONV_SHAPES,
    DEVICE,
    DTYPES,
    LAYOUTS,
    as_float64,
    assert_relative_l2,
    assert_two_errors,
)
from tests.offsets import only_the_ends, zeros_but

EPS = 1e-5
SHAPES = tuple(shape for shape in CONV_SHAPES if shape[1] >= 8)
pytestmark = pytest.mark.usefixtures("poisoned", "exact_float32")


class Draw:
    """Random parts of one problem, on the device, in its dtype."""

    def __init__(self, shape, dtype, generator):
        self.inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
        self.shape, self.dtype, self.generator = (
            (*shape[:2], *self.inputs["size"]),
            dtype,
            generator,
        )
        self.dy, self.weight = self.inputs["dy"], self.inputs["weight"]
        self.rest = (self.inputs["size"], self.inputs["stride"], self.inputs["padding"])

    def randn(self, *size):
        return torch.randn(size, generator=self.generator)

    def image(self):
        """Something of the input's size, channels-last."""
        return nhwc(self.randn(*self.shape).to(DEVICE, self.dtype))

    def norm(self):
        c = self.shape[1]
        weight, bias, mean = self.randn(c) + 0.5, self.randn(c), self.randn(c)
        var = self.randn(c) ** 2 + 0.2
        return Norm(*(t.to(DEVICE) for t in (weight, bias, mean, var)), EPS)

    def made(self):
        """A Gradient that starts from dy."""
        k = self.dy.shape[1]
        x = nhwc(self.randn(*self.dy.shape).to(DEVICE, self.dtype))
        return Gradient(self.dy, x, self.randn(k).to(DEVICE), self.randn(3, k).to(DEVICE))

    def before(self, kind, act="relu"):
        """The unit before, the mask its forward kept or an outsider would (from what it wrote)."""
        x, norm = self.image(), self.norm()
        residual = None if kind == "none" else self.image()
        r_norm = self.norm() if kind == "norm" else None
        y, mask = bn_passes.forward(x, norm, residual, r_norm, act)
        if act in ("relu", "leaky_relu"):
            assert torch.equal(bits_of(y > 0), mask) or kind != "add"
            mask = bits_of(y > 0)
        return Before(x, norm, act, residual, r_norm, None), mask


def bits_of(positive):
    """uint8 [N*H*W, C/8] of a bool [N, C, H, W]."""
    n, c, h, w = positive.shape
    bits = positive.permute(0, 2, 3, 1).reshape(n * h * w, c // 8, 8).to(torch.uint8)
    return (bits << torch.arange(8, device=bits.device)).sum(2).to(torch.uint8)


def in_float64(value):
    """Tensors in float64 on the CPU, masks on the CPU, also inside of NamedTuples."""
    if isinstance(value, torch.Tensor):
        return value.double().cpu() if value.is_floating_point() else value.cpu()
    return type(value)(*map(in_float64, value)) if isinstance(value, tuple) else value


def check(draw, dy=None, fork=None, before=None, mask=None, tile=None):
    """The launcher against the reference in float64; where z is recomputed the truth is told the
    forward's `mask`. Returns what was launched."""
    dy = draw.dy if dy is None else dy
    dx, partials = data_gradient(dy, draw.weight, *draw.rest, fork=fork, before=before, tile=tile)
    told = before if mask is None else before._replace(mask=mask)
    if isinstance(dy, Gradient):  # what is stored otherwise is rounded: so is the truth's dy
        a, b, c = dy.coefficients.view(3, -1, 1, 1)
        dy = a * dy.dz.float() + b * (dy.x.float() - dy.mean.view(-1, 1, 1)) + c
        dy = dy.to(draw.dtype)
    truth, _ = reference(
        in_float64(dy), in_float64(draw.weight), *draw.rest, in_float64(fork), in_float64(told)
    )
    assert dx.shape == truth.shape
    assert dx.dtype == draw.dtype
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert_relative_l2(dx, truth)
    if before is None:
        assert partials is None
        return dx, partials
    assert_sums(dx, partials, before)
    return dx, partials


def assert_sums(dz, partials, before):
    """Within 1e-4 of the sum of magnitudes, over the dz that was stored."""
    dz = in_float64(dz)
    centred = [in_float64(before.x) - in_float64(before.norm.mean).view(-1, 1, 1)]
    if before.r_norm is not None:
        mean = in_float64(before.r_norm.mean).view(-1, 1, 1)
        centred.append(in_float64(before.residual) - mean)
    terms = torch.stack([dz, *(dz * away for away in centred)])
    assert partials.dtype == torch.float32
    assert (len(partials), partials.shape[2]) == (len(terms), terms.shape[2])
    away = in_float64(partials).sum(1) - terms.sum((1, 3, 4))
    assert (away.abs() <= 1e-4 * terms.abs().sum((1, 3, 4)) + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, generator):
    inputs = SPEC.make_inputs(shape, dtype, DEVICE, generator)
    dx = conv_dgrad(**inputs)
    truth = reference(**as_float64(inputs))[0]
    assert_relative_l2(dx, truth)
    assert_two_errors(dx, reference(**inputs)[0], truth, "dx")
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_reference_is_what_autograd_says(generator):
    """Convolution of act(norm(x) + r_norm(r)), forked: the gradient in z, and of both norms."""
    draw = Draw((2, 8, 9, 7, 16, 3, 2, 1), torch.float64, generator)
    before, _ = Before(draw.image(), draw.norm(), "silu", draw.image(), draw.norm()), None
    before, fork = in_float64(before), in_float64(draw.image())
    weight, dy = in_float64(draw.weight), in_float64(draw.dy)

    def batch_norm(x, norm):
        return F.batch_norm(x, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps)

    weights = [norm.weight.requires_grad_() for norm in (before.norm, before.r_norm)]
    z = batch_norm(before.x, before.norm) + batch_norm(before.residual, before.r_norm)
    h = F.silu(z)
    y = F.conv2d(h, weight, stride=2, padding=1)
    loss = (y * dy).sum() + (h * fork).sum()
    expected, *gammas = torch.autograd.grad(loss, (z, *weights))
    before.norm.weight.requires_grad_(False)
    before.r_norm.weight.requires_grad_(False)
    dz, sums = reference(dy, weight, (9, 7), 2, 1, fork, before)
    assert torch.allclose(dz, expected, rtol=1e-10, atol=1e-10)
    inverses = [torch.ones(8), *((n.var + EPS).rsqrt() for n in (before.norm, before.r_norm))]
    found = torch.stack(inverses) * sums
    assert torch.allclose(found, torch.stack((expected.sum((0, 2, 3)), *gammas)), rtol=1e-8)


def test_random_shapes_and_parts(generator):
    """Any taps, stride and padding, odd sizes, one to five images, any prologue and epilogue."""

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(10):
        r, stride = pick(1, 5), pick(1, 3)
        h, w = pick(r, 9), pick(r, 9)
        shape = (pick(1, 5), 8 * pick(1, 10), h, w, 8 * pick(1, 5), r, stride, pick(0, r))
        kind, masked = ("none", "add", "norm")[pick(0, 2)], pick(0, 1)
        print(shape, kind, masked)
        draw = Draw(shape, DTYPES[pick(0, 2)], generator)
        unit, mask = draw.before(kind)
        unit = unit._replace(mask=mask) if masked else unit
        fork, dy = (draw.image(), None)[pick(0, 1)], (draw.made(), None)[pick(0, 1)]
        check(draw, dy, fork, *((unit, mask) if pick(0, 3) else ()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 24, 9, 7, 40, 3, 2, 1), (3, 64, 5, 6, 16, 3, 1, 1), (1, 40, 7, 5, 24, 1, 2, 0)],
    ids=str,
)
def test_every_part(shape, dtype, generator):
    """What the trunk launches: each with and without prologue, the mask kept and recomputed."""
    draw = Draw(shape, dtype, generator)
    made, fork = draw.made(), draw.image()
    check(draw, made)
    check(draw, draw.dy, fork)
    for kind in ("none", "add", "norm"):
        unit, mask = draw.before(kind)
        check(draw, draw.dy, None, unit, mask)
        recomputed = check(draw, made, fork, unit, mask)
        unit = unit._replace(mask=mask)
        kept = data_gradient(made, draw.weight, *draw.rest, fork=fork, before=unit)
        assert all(torch.equal(a, b) for a, b in zip(recomputed, kept, strict=True))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_every_parity_and_padding(taps, stride, generator):
    """Ones everywhere: a pixel counts the taps that reach it, exactly; the others are zeros."""
    for padding, (h, w) in product(range(taps), ((6, 5), (7, 8))):
        p, q = conv_out(h, taps, stride, padding), conv_out(w, taps, stride, padding)
        dy = torch.ones(1, 8, p, q, device=DEVICE)
        weight = torch.ones(8, 8, taps, taps, device=DEVICE)
        dx = conv_dgrad(dy, weight, (h, w), stride=stride, padding=padding)
        assert torch.equal(dx, reference(dy, weight, (h, w), stride, padding)[0])


def test_taps_stay_in_their_parity(generator):
    """An infinite tap spoils the pixels it reaches; one more product, even by zero, would be NaN
    elsewhere."""
    dy = torch.randn(1, 8, 4, 4, generator=generator).to(DEVICE)
    for r, s in product(range(3), repeat=2):
        weight = torch.ones(8, 8, 3, 3, device=DEVICE)
        weight[:, :, r, s] = math.inf
        spoilt = ~torch.isfinite(conv_dgrad(dy, weight, (8, 8), stride=2, padding=1))[0, 0]
        h, w = (1 - r) % 2, (1 - s) % 2
        assert spoilt[h::2, w::2].any()
        spoilt[h::2, w::2] = False
        assert not spoilt.any()


def test_filters_higher_than_wide(generator):
    for taps, size in (((3, 7), (7, 9)), ((5, 1), (6, 4))):
        weight = torch.randn(16, 8, *taps, generator=generator).to(DEVICE)
        outputs = (conv_out(length, t, 2, 1) for length, t in zip(size, taps, strict=True))
        dy = torch.randn(2, 16, *outputs, generator=generator).to(DEVICE)
        dx = conv_dgrad(dy, weight, size, stride=2, padding=1)
        truth = reference(dy.double().cpu(), weight.double().cpu(), size, 2, 1)[0]
        assert_relative_l2(dx, truth)


@pytest.mark.parametrize("tile", dict.fromkeys((*WIDE, *NARROW, *SMALL_WIDE, *FLOAT32)), ids=str)
def test_every_tile(tile, generator):
    """More than one tile each way, the last ones partly filled."""
    draw = Draw((2, 136, 13, 12, 24, 3, 1, 1), torch.float16, generator)
    unit, mask = draw.before("norm")
    _, partials = check(draw, draw.made(), draw.image(), unit, mask, tile)
    assert partials.shape == (3, math.ceil(2 * 13 * 12 / tile.block_m), 136)


@pytest.mark.parametrize("act", ACTS)
def test_every_activation(act, generator):
    draw = Draw((2, 16, 7, 6, 8, 3, 2, 1), torch.float32, generator)
    for kind in ("none", "add", "norm"):
        unit, _ = draw.before(kind, act)
        check(draw, None, draw.image(), unit)


def test_dz_is_rounded_once(generator):
    """dx and the fork cancel to what bfloat16 does not keep beside them: added in float32, kept."""
    dy = torch.full((1, 8, 4, 4), 1.0, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.full((8, 8, 1, 1), 1.0078125 / 8, dtype=torch.bfloat16, device=DEVICE)
    weight[0] = 0.126953125  # dx is 1.008789...: rounded first it would leave another difference
    exact = weight.double().sum(0).view(1, 8, 1, 1).expand(1, 8, 4, 4)
    fork = torch.full((1, 8, 4, 4), -1.0, dtype=torch.bfloat16, device=DEVICE)
    dx, _ = data_gradient(dy, weight, (4, 4), 1, 0, fork=fork)
    assert torch.equal(dx, (exact - 1).bfloat16())
    assert not torch.equal(dx, (exact.bfloat16() - 1))


@pytest.mark.parametrize("kind", ["none", "norm"])
def test_mask_is_the_forwards_where_z_rounds_to_zero(kind, generator):
    """float16: most z lie below the smallest subnormal, or are exactly 0; eager's mask is 0."""
    draw = Draw((2, 16, 6, 5, 8, 3, 1, 1), torch.float16, generator)
    unit, _ = draw.before(kind)
    c = 16
    tiny = torch.tensor([1e-9, 2.9e-8, 3.1e-8, 1e-7] * (c // 4), device=DEVICE)
    norm = Norm(tiny, torch.zeros_like(tiny), torch.zeros_like(tiny), torch.ones_like(tiny), EPS)
    unit = unit._replace(norm=norm, r_norm=norm if kind == "norm" else None)
    y, _ = bn_passes.forward(unit.x, norm, unit.residual, unit.r_norm, "relu")
    assert 0.1 < (y > 0).float().mean() < 0.4  # of half of them z itself is positive
    dz, _ = data_gradient(torch.ones_like(draw.dy), draw.weight.abs() + 1, *draw.rest, before=unit)
    assert torch.equal(dz > 0, y > 0)


def test_sums_match_the_pass_they_replace(generator):
    """Through `coefficients` the gradients of the parameters are those of bn_sums over dx."""
    draw = Draw((2, 40, 9, 7, 24, 3, 2, 1), torch.float32, generator)
    unit, _ = draw.before("norm")
    _, partials = check(draw, None, None, unit)
    dx, _ = check(draw)
    arguments = (unit.x, unit.norm, unit.act, unit.residual, unit.r_norm)
    _, expected = bn_sums.sums(dx, *arguments)
    norms = (unit.norm, unit.r_norm)
    ours = bn_sums.coefficients(partials, 2 * 9 * 7, *norms)
    theirs = bn_sums.coefficients(expected, 2 * 9 * 7, *norms)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_prologue_is_zero_outside_the_image(generator):
    """dz and x zero, C one: dy is 1 inside and must be 0, not C, where a tap leaves the image."""
    k = 8
    zeros = torch.zeros(1, k, 4, 5, device=DEVICE)
    coefficients = torch.tensor([0.0, 0.0, 1.0], device=DEVICE)[:, None].expand(3, k).contiguous()
    made = Gradient(zeros, zeros, torch.zeros(k, device=DEVICE), coefficients)
    weight = torch.ones(k, 8, 3, 3, device=DEVICE)
    dx, _ = data_gradient(made, weight, (4, 5), 1, 1)
    assert torch.equal(dx, reference(torch.ones_like(zeros), weight, (4, 5), 1, 1)[0])


def test_prologue_makes_the_bits_the_pass_stored(generator):
    draw = Draw((2, 16, 6, 5, 24, 3, 1, 1), torch.bfloat16, generator)
    made, k = draw.made(), 24
    norm = Norm(torch.ones(k), torch.zeros(k), made.mean.cpu(), torch.ones(k), EPS)
    norm = Norm(*(t.to(DEVICE) for t in norm[:4]), EPS)
    stored, _ = bn_passes.apply(made.dz, made.x, norm, made.coefficients)
    ours, _ = data_gradient(made, draw.weight, *draw.rest)
    assert torch.equal(ours, data_gradient(stored, draw.weight, *draw.rest)[0])


def test_infinite_gradient_stays_in_its_window():
    """Masked filters and rows past the last must not touch other memory: 0 * inf."""
    dy = torch.ones(1, 24, 6, 6, device=DEVICE)
    dy[0, 0, 5, 5] = math.inf
    dx = conv_dgrad(dy, torch.ones(24, 8, 3, 3, device=DEVICE), (6, 6), padding=1)
    assert torch.isinf(dx[:, :, 4:, 4:]).all()
    assert torch.isfinite(dx[:, :, :4]).all()
    assert torch.isfinite(dx[:, :, :, :4]).all()


def test_repeats_bit_for_bit(generator):
    draw = Draw((3, 16, 14, 13, 16, 3, 2, 1), torch.float16, generator)
    unit, mask = draw.before("norm")
    first, second = (check(draw, draw.dy, None, unit, mask) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_in_any_layout(layout, generator):
    draw = Draw((2, 8, 7, 5, 16, 3, 2, 1), torch.float32, generator)
    unit, mask = draw.before("norm")
    check(draw, layout(draw.dy), layout(draw.image()), unit, mask)
    given = conv_dgrad(layout(draw.dy), draw.weight.contiguous(), (7, 5), stride=2, padding=1)
    assert_relative_l2(given, reference(in_float64(layout(draw.dy)), in_float64(draw.weight),
                                        *draw.rest)[0])  # fmt: skip


def test_weight_is_cast(generator):
    draw = Draw((2, 8, 7, 5, 16, 3, 1, 1), torch.float16, generator)
    wide = draw.weight.float() * (1 + 1e-5)
    dx = conv_dgrad(draw.dy, wide, (7, 5), padding=1)
    assert torch.equal(dx, data_gradient(draw.dy, wide.half(), *draw.rest)[0])


def test_empty_batch():
    dy, weight = torch.empty(0, 16, 3, 3, device=DEVICE), torch.ones(16, 8, 3, 3, device=DEVICE)
    assert conv_dgrad(dy, weight, (5, 5), stride=2, padding=1).shape == (0, 8, 5, 5)


def test_offsets_beyond_31_bits(generator):
    """Images of 4096 pixels and 8 channels, the last beyond element 2^31, through a 1x1 filter."""
    n, c, size = 65537, 8, (64, 64)
    shape = (n, 4096 * c)
    ends = [torch.randn(1, 4096 * c, generator=generator).half().to(DEVICE) for _ in range(4)]
    weight = torch.randn(c, c, 1, 1, generator=generator).half().to(DEVICE)
    norm = Norm(*(torch.rand(c, generator=generator).to(DEVICE) + 0.5 for _ in range(4)), EPS)
    last = [end.view(1, *size, c).permute(0, 3, 1, 2) for end in ends]
    y, _ = bn_passes.forward(last[2], norm, last[3], norm, "relu")
    mask = torch.zeros((n * 4096, 1), dtype=torch.uint8, device=DEVICE)
    mask[-4096:] = bits_of(y > 0)
    with only_the_ends(sys.modules[data_gradient.__module__]):
        dy, fork, x, r = (
            zeros_but(end, shape).view(n, *size, c).permute(0, 3, 1, 2) for end in ends
        )
        for kept in (mask, None):
            before = Before(x, norm, "relu", r, norm, kept)
            dz, partials = data_gradient(dy, weight, size, 1, 0, fork=fork, before=before)
            told = Before(last[2], norm, "relu", last[3], norm, bits_of(y > 0))
            truth, _ = reference(
                *map(in_float64, (last[0], weight)), size, 1, 0, *map(in_float64, (last[1], told))
            )
            rows = n * 4096 // partials.shape[1]  # of the last program
            found = dz[-1:].permute(0, 2, 3, 1).reshape(-1, c)[-rows:]
            expected = truth.permute(0, 2, 3, 1).reshape(-1, c)[-rows:]
            assert_relative_l2(found, expected)
            s1 = found.float().sum(0)
            assert torch.allclose(partials[0, -1], s1, rtol=1e-4, atol=1e-3)


def test_no_second_derivative(generator):
    draw = Draw((1, 8, 4, 4, 8, 3, 1, 1), torch.float32, generator)
    dx = conv_dgrad(draw.dy.requires_grad_(), draw.weight, (4, 4), padding=1)
    with pytest.raises(RuntimeError, match="has none of its own"):
        dx.sum().backward()


def test_opcheck(generator):
    for shape in (SHAPES[1], SHAPES[3]):
        inputs = SPEC.make_inputs(shape, torch.float32, DEVICE, generator)
        inputs["size"] = list(inputs["size"])
        torch.library.opcheck(_op, tuple(inputs.values()))


def test_torch_compile_goes_through(generator):
    draw = Draw((2, 8, 5, 5, 8, 3, 2, 1), torch.float32, generator)

    def step(dy, weight):
        return conv_dgrad(dy * 2, weight, (5, 5), stride=2, padding=1) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(draw.dy, draw.weight), step(draw.dy, draw.weight))


DY, WEIGHT = torch.zeros(2, 16, 5, 5), torch.zeros(16, 8, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(16, 3, 3, 3)}, "multiple of 8 channels, not 3: .* an image"),
        ({"weight": torch.zeros(12, 8, 3, 3), "dy": DY[:, :12]}, "multiple of 8 filters"),
        ({"dy": DY[:, :8]}, "weight's 16 filters"),
        ({"dy": DY[..., :4]}, "must be 5x5"),
        ({"size": (6, 5)}, "must be 6x5"),
        ({"weight": WEIGHT.to("meta")}, "one device"),
        ({"dy": DY[0]}, r"dy must be \[N, C, H, W\]"),
        ({"weight": WEIGHT[0]}, r"\[K, C, R, S\]"),
        ({"dy": DY.double()}, "not torch.float64"),
        ({"stride": 0}, "stride 0"),
        ({"padding": -1}, "padding -1"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {"dy": DY, "weight": WEIGHT, "size": (5, 5), "padding": 1}
    with pytest.raises(ValueError, match=message):
        conv_dgrad(**{**inputs, **change})


def test_without_triton_the_reference_answers(generator, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    inputs = SPEC.make_inputs(SHAPES[1], torch.float32, torch.device("cpu"), generator)
    with record() as recording:
        dx = conv_dgrad(**inputs)
    assert recording.launches == []
    assert torch.equal(dx, reference(**inputs)[0])


@pytest.mark.parametrize("batch", [32, 256])
def test_table_sites_are_recorded_as_planned(batch):
    """Every site of every variant: one launch, whose programs cover each parity's pixels."""
    assert SPEC.shapes == SITES[1:]
    for _, c, h, w, k, r, stride, padding in SPEC.shapes:
        p, q = conv_out(h, r, stride, padding), conv_out(w, r, stride, padding)
        dy = torch.empty(batch, k, p, q, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(k, c, r, r, dtype=torch.bfloat16, device="meta")
        for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
            with record(capability) as recording:
                SPEC.launch(dy, weight, (h, w), stride, padding)
            assert len(recording.launches) == 9
            for launched in recording.launches:
                blocks = launched.options
                tiles = stride**2 * math.ceil(batch * h * w / stride**2 / blocks["BLOCK_M"])
                assert launched.grid == (tiles * math.ceil(c / blocks["BLOCK_N"]),)

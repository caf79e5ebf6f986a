"""conv_wgrad: the gradient of a convolution's weight.

    dW[k, r, s, c] = sum over n, p, q of dy[n, k, p, q] * h[n, c, p*stride - padding + r, q*... + s]

is the matrix product [K, M] x [M, R*S*C] over the M = N*P*Q pixels: few results, long sums. The
pixels are cut into parts; a program adds up one part of one tile of dW in float32, and a second
kernel adds the parts in order, so that sums repeat bit for bit. One part needs no second kernel.

Traffic: dy and h once each, dW in float32, and 8 bytes an element of dW for every part (written
and read); `parts_for` weighs these against multiprocessors left idle. With prologues
(`conv_prologue`) neither BatchNorm's dx nor the activation's output has to be stored for this.

Layouts: dy [N, K, P, Q] and h [N, C, H, W] channels-last, dW [K, C, R, S] channels-last (KRSC), see
`conv_gemm` for images. Where Triton cannot run the op is `reference`.
"""

from functools import cache
from typing import NamedTuple

import torch

from kernels.bn_checks import Norm
from kernels.bn_sums import affine
from kernels.conv_gemm import IMAGE_CHANNELS, SITES, empty_output, make_conv_inputs, packed_image
from kernels.conv_prologue import (
    Gradient,
    Normed,
    gradient,
    gradient_arguments,
    load_coefficients,
    norm_arguments,
    normed,
    stored_dy,
    stored_h,
)
from kernels.launch import (
    capability,
    cdiv,
    check,
    check_image,
    describe,
    empty_nhwc,
    multiprocessors,
    next_power_of_2,
    nhwc,
    run,
    runs_triton,
    tl,
    triton,
)
from kernels.numerics import dot, rounded
from kernels.shapes import conv_out
from kernels.spec import Cost, Inputs, KernelSpec, Shape


class Tile(NamedTuple):
    """A program's part of dW: block_k filters x block_n columns (of R*S*C), and the block_m pixels
    it adds a step."""

    block_k: int
    block_n: int
    block_m: int
    warps: int
    stages: int


# sm_90 and sm_100 multiply from shared memory; two warp groups leave registers for the prologues
WIDE = Tile(128, 128, 64, 8, 3)
NARROW = Tile(64, 128, 64, 8, 3)  # up to 64 filters
SMALL_WIDE = Tile(128, 128, 32, 8, 3)  # sm_86 / 89 / 120: 99 KB of shared memory
SMALL_NARROW = Tile(64, 128, 32, 4, 4)  # those and sm_80
FLOAT32 = Tile(64, 64, 16, 4, 2)  # no matrix instructions: for checks
# Pixels a program could add in the time its float32 tile takes to be written and read once more:
# 132 tiles of 128x128 are 17 MB, 4.8 us each way together at 3.5 TB/s; 64 pixels of each take
# 0.46 us at 600 TFLOP/s. An A100's ratio and that of the smaller tiles are about the same
PART_PIXELS = 640
SUM_ELEMENTS = 2048


@triton.jit
def _wgrad_kernel(
    dy_ptr, dy_x_ptr, dy_mean_ptr, coefficients_ptr,
    h_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps,
    dw_ptr, rows, part,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, PIXEL: tl.constexpr, ACT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = R * S * C
    ACROSS: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = ACROSS * ((K + BLOCK_K - 1) // BLOCK_K)
    # tiles run fastest: programs that read one part of the pixels run together, it stays in L2
    index = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    k = (tile // ACROSS * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
    column = (tile % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    r = column // (S * C)
    s = column // C % S
    c = column % C
    if coefficients_ptr is not None:
        dy_mean, a, b, constant = load_coefficients(dy_mean_ptr, coefficients_ptr, k, K)
    if mean_ptr is not None:
        mean, scale, shift = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, c, C, eps)
    acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for first in range(index * part, tl.minimum((index + 1) * part, rows), BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        dy_inside = (m < rows)[None, :]
        if K % BLOCK_K > 0:
            dy_inside = dy_inside & (k < K)
        at = m.to(tl.int64)[None, :] * K + k
        dy = tl.load(dy_ptr + at, mask=dy_inside, other=0.0)
        if coefficients_ptr is not None:
            dy_x = tl.load(dy_x_ptr + at, mask=dy_inside, other=0.0)
            dy = gradient(dy, dy_x, dy_inside, dy_mean, a, b, constant)

        n = (m // (P * Q)).to(tl.int64)[:, None]
        y = (m // Q % P * STRIDE - PAD_H)[:, None]
        x = (m % Q * STRIDE - PAD_W)[:, None]
        h_inside = (m < rows)[:, None]
        if PAD_H > 0:
            h_inside = h_inside & (y + r >= 0) & (y + r < H)
        if PAD_W > 0:
            h_inside = h_inside & (x + s >= 0) & (x + s < W)
        if COLUMNS % BLOCK_N > 0:
            h_inside = h_inside & (column < COLUMNS)
        at = ((n * H + y) * W + x) * PIXEL + ((r * W + s) * PIXEL + c)
        h = tl.load(h_ptr + at, mask=h_inside, other=0.0)
        if mean_ptr is not None:
            h = normed(h, h_inside, mean, scale, shift, ACT)
        acc = dot(dy, h, acc)

    at = index.to(tl.int64) * (K * COLUMNS) + k * COLUMNS + column
    inside = (k < K) & (column < COLUMNS)
    tl.store(dw_ptr + at, rounded(acc, dw_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(
    partials_ptr, dw_ptr, parts, elements,
    S: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr,
    PART: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of partials [parts, K, R, TAPS, CHANNELS], of which dW is the first S and C."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = ((i // (S * C)) * TAPS + i // C % S) * CHANNELS + i % C
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = (first + tl.arange(0, BLOCK_P))[:, None]
        inside = (part < parts) & (i < elements)[None, :]
        partials = partials_ptr + part.to(tl.int64) * PART + at[None, :]
        total += tl.sum(tl.load(partials, mask=inside, other=0.0), axis=0)
    tl.store(dw_ptr + i, rounded(total, dw_ptr.dtype.element_ty), mask=i < elements)


def tile_for(capability: tuple[int, int], filters: int, dtype: torch.dtype) -> Tile:
    """The tile for a GPU of `capability`."""
    if dtype == torch.float32:
        return FLOAT32
    if capability[0] in (9, 10):
        return NARROW if filters <= 64 else WIDE
    if filters <= 64:
        return SMALL_NARROW
    return WIDE if capability == (8, 0) else SMALL_WIDE


@cache
def parts_for(tiles: int, pixels: int, depth: int, multiprocessors: int) -> int:
    """Into how many parts to cut the pixels of `tiles` tiles, `depth` pixels a step: the number
    that ends first.

    A multiprocessor works through ceil(tiles*n / multiprocessors) programs of ceil(steps/n) steps,
    each followed, unless n = 1, by what its partial tile costs.
    """
    steps = cdiv(pixels, depth)

    def time(n: int) -> int:
        program = cdiv(steps, n) * depth + (PART_PIXELS if n > 1 else 0)
        return cdiv(tiles * n, multiprocessors) * program

    return min(range(1, min(steps, 4 * multiprocessors) + 1), key=time)


def weight_gradient(
    dy: torch.Tensor | Gradient,
    h: torch.Tensor | Normed,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
    *,
    dtype: torch.dtype = torch.float32,
    tile: Tile | None = None,
    parts: int | None = None,
) -> torch.Tensor:
    """Launch dW [K, C, R, S] of `dtype`, channels-last, and where the pixels are cut into several
    `parts` the sum of these. dy [N, K, P, Q] and h [N, C, H, W] are stored, or made on load; images
    (C <= 4) are stored. An empty batch gives zeros.
    """
    dz, x = stored_dy(dy), stored_h(h)
    (n, channels, height, width), (k, p, q), (r, s) = x.shape, dz.shape[1:], kernel_size
    dw = empty_nhwc(k, channels, r, s, like=x, dtype=dtype)
    rows = n * p * q
    if not rows:
        return dw.zero_()
    norm, act = norm_arguments(h)
    image = channels <= IMAGE_CHANNELS
    taps, c, pad_w, pixel = s, channels, padding, channels
    if image:  # as in the forward: a filter row is one tap of all its channels
        x, width, taps = packed_image(x, q, s, stride, padding)
        c, pad_w, pixel = IMAGE_CHANNELS, 0, IMAGE_CHANNELS
    columns = r * taps * c
    tile = tile or tile_for(capability(x.device), k, x.dtype)
    tiles = cdiv(k, tile.block_k) * cdiv(columns, tile.block_n)
    parts = parts or parts_for(tiles, rows, tile.block_m, multiprocessors(x.device))
    part = cdiv(cdiv(rows, parts), tile.block_m) * tile.block_m
    parts = cdiv(rows, part)  # without those that are left no pixel
    summed = parts > 1 or image
    size = (parts, k, columns)
    partials = torch.empty(size, dtype=torch.float32, device=x.device) if summed else dw
    filter_row = {"C": taps * c, "S": 1} if image else {"C": c, "S": s}
    sizes = {"H": height, "W": width, "K": k, "P": p, "Q": q, "R": r, **filter_row}
    walk = {"STRIDE": stride, "PAD_H": padding, "PAD_W": pad_w, "PIXEL": pixel}
    blocks = {"BLOCK_K": tile.block_k, "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    args = (dz, *gradient_arguments(dy), x, *norm, partials, rows, part)
    run(_wgrad_kernel, (tiles * parts,), *args, **sizes, **walk, ACT=act, **blocks, **options)
    if summed:
        block_p = min(next_power_of_2(parts), 16)
        block = SUM_ELEMENTS // block_p
        sizes = {"S": s, "C": channels, "TAPS": taps, "CHANNELS": c, "PART": k * columns}
        args = (partials, dw, parts, dw.numel())
        run(_sum_kernel, (cdiv(dw.numel(), block),), *args, **sizes, BLOCK_P=block_p, BLOCK=block)
    return dw


def reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    kernel_size: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
) -> torch.Tensor:
    """dW in plain PyTorch, which rounds it to the inputs' dtype, in float32 or wider."""
    size = (dy.shape[1], x.shape[1], *kernel_size)
    dw = torch.nn.grad.conv2d_weight(x, size, dy, stride, padding)
    return dw.to(torch.promote_types(dw.dtype, torch.float32))


@torch.library.custom_op("lapis::conv_wgrad", mutates_args=())
def _op(
    dy: torch.Tensor, x: torch.Tensor, kernel_size: list[int], stride: int, padding: int
) -> torch.Tensor:
    if runs_triton(x):
        return weight_gradient(dy, x, kernel_size, stride, padding)
    return nhwc(reference(dy, x, kernel_size, stride, padding))


@_op.register_fake
def _(dy, x, kernel_size, stride: int, padding: int):
    return empty_nhwc(dy.shape[1], x.shape[1], *kernel_size, like=x, dtype=torch.float32)


def conv_wgrad(
    dy: torch.Tensor,
    x: torch.Tensor,
    kernel_size: tuple[int, int],
    *,
    stride: int = 1,
    padding: int = 0,
) -> torch.Tensor:
    """The gradient of weight [K, C, R, S], kernel_size = (R, S), of a convolution of x [N, C, H, W]
    whose output has the gradient dy [N, K, P, Q]: float32, channels-last, not differentiable.

    Raises ValueError on shapes, dtypes and devices the kernels do not take: dy not of x's dtype and
    device or not of the output's shape, C neither a multiple of 8 nor up to 4, K no multiple of 8.
    """
    check_image("x", x)
    check_image("dy", dy)
    check(
        (dy.dtype, dy.device) == (x.dtype, x.device),
        lambda: f"dy {describe(dy)} must have the dtype and device of x {describe(x)}",
    )
    (n, c, h, w), (k, (r, s)) = x.shape, (dy.shape[1], kernel_size)
    check(
        c % 8 == 0 or 0 < c <= IMAGE_CHANNELS,
        lambda: f"x must have a multiple of 8 channels (or 1 to 4, an image), not {c}",
    )
    check(k % 8 == 0 and k > 0, lambda: f"dy must have a multiple of 8 channels, not {k}")
    check(
        stride >= 1 and padding >= 0,
        lambda: f"stride {stride} must be at least 1, padding {padding} at least 0",
    )
    check(
        1 <= r <= h + 2 * padding and 1 <= s <= w + 2 * padding,
        lambda: f"kernel_size {r}x{s} does not fit x {h}x{w} with padding {padding}",
    )
    expected = (n, k, conv_out(h, r, stride, padding), conv_out(w, s, stride, padding))
    check(
        tuple(dy.shape) == expected,
        lambda: f"dy {describe(dy)} must be {expected}, the output of x {describe(x)}",
    )
    return _op(dy, x, [r, s], stride, padding)


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    inputs = make_conv_inputs(shape, dtype, device, generator)
    x, weight = inputs["x"].detach(), inputs["weight"]
    stride, padding = inputs["stride"], inputs["padding"]
    size = empty_output(x.to("meta"), weight, stride, padding).shape
    dy = torch.randn(size, generator=generator, device=generator.device).to(device, dtype)
    kernel_size = tuple(weight.shape[2:])
    return {"dy": nhwc(dy), "x": x, "kernel_size": kernel_size, "stride": stride,
            "padding": padding}  # fmt: skip


def _launch(
    dy: torch.Tensor, x: torch.Tensor, kernel_size: tuple[int, int], stride: int, padding: int
) -> None:
    def channels(of: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.ones((rows, of.shape[1]), device=of.device)

    h = Normed(x, Norm(*channels(x, 4), 1e-5), "relu")
    made = Gradient(dy, dy, channels(dy, 1)[0], channels(dy, 3))
    for one in (dy, made):
        for other in (x, h) if x.shape[1] > IMAGE_CHANNELS else (x,):
            weight_gradient(one, other, kernel_size, stride, padding)


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    n, c, h, w, k, r, stride, padding = shape
    pixels = n * conv_out(h, r, stride, padding) * conv_out(w, r, stride, padding)
    weights = k * c * r * r
    elements = float(n * c * h * w + pixels * k)
    return {"forward": Cost(2.0 * pixels * weights, elements * itemsize + weights * 4)}


SPEC = KernelSpec("conv_wgrad", reference, conv_wgrad, _make_inputs, _launch, _cost, SITES)

"""The implicit matrix product every convolution room launches, its tiles and its input checks.

The product is [N*P*Q, C*R*S] x [C*R*S, K]; its left operand is never stored, each tile reads the
shifted pixels of x.

Layout: x [N, C, H, W] and y [N, K, P, Q] channels-last (NHWC), weight [K, C, R, S] channels-last
(KRSC); others are copied once. C and K are multiples of 8: 16-byte loads. Images (C <= 4) are first
copied to 4 channels with their left and right padding in place; then the S pixels of a filter row
are one run of memory, which the kernel takes as S = 1 and C = 4*S (S rounded up to 4: 7 becomes
8). For 7x7/2 on 224x224 in bf16 the copy adds 0.42 MB written and read an image to the 0.30 MB of x
and 1.61 MB of y, and the products are 224 deep instead of 147; 8 channels would be 0.80 MB and
392, and the dense 147 would be read 2 bytes at a time.
"""

from dataclasses import dataclass, replace

import torch

from kernels.activation import activate
from kernels.bn_checks import Norm
from kernels.bn_stats import store_partial
from kernels.bn_sums import affine, load, normalized
from kernels.conv_prologue import NO_NORM, Normed, norm_arguments, normed, stored_h
from kernels.launch import (
    capability,
    cdiv,
    check,
    check_image,
    empty_nhwc,
    multiprocessors,
    nhwc,
    run,
    tl,
    triton,
)
from kernels.numerics import dot, rounded
from kernels.shapes import RESNET34, conv_out
from kernels.spec import Cost, Inputs, Shape

IMAGE_CHANNELS = 4  # what C <= 4 is padded to
# [N, C, H, W, K, R, stride, padding] at batch 32
SITES = tuple((32, s.c, s.h, s.w, s.k, s.r, s.stride, s.padding) for s in RESNET34)


@dataclass(frozen=True)
class Tile:
    """A program's part of the product: BLOCK_M pixels x BLOCK_N filters, BLOCK_K deep a step."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# Largest first; a launch takes the first that gives every multiprocessor a program.
# more than 64 filters, sm_80 / 90 / 100: up to 164 KB of shared memory; 256x128, and 128x128 in
# 4 warps, spill. The last, for few pixels, goes deep: it runs alone on a multiprocessor
WIDE = (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 4), Tile(64, 128, 128, 4, 3))
SMALL_WIDE = (  # sm_86 / 89 / 120: 99 KB
    Tile(128, 128, 32, 8, 4),
    Tile(128, 64, 64, 4, 3),
    Tile(64, 64, 64, 4, 3),
)
NARROW = (Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 4))
FLOAT32 = (Tile(64, 64, 16, 4, 2),)  # no matrix instructions: for checks


@triton.jit
def _conv_kernel(
    x_ptr, in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr, in_eps,
    w_ptr, y_ptr, partials_ptr,
    weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, residual_ptr, rows,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, PIXEL: tl.constexpr, IN_ACT: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """PIXEL: elements of x between two columns. A pointer that is None switches its part off."""
    # filters run fastest: the programs that read one stretch of x run together, W stays in L2
    tile = tl.program_id(0) // tl.cdiv(K, BLOCK_N)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tl.cdiv(K, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)
    # past the end the last row and filter are computed again: no mask for it in the loop
    pixel = tl.minimum(m, rows - 1)
    n = (pixel // (P * Q)).to(tl.int64)
    h = pixel // Q % P * STRIDE - PAD_H
    w = pixel % Q * STRIDE - PAD_W
    x_ptrs = x_ptr + (((n * H + h) * W + w) * PIXEL)[:, None] + c[None, :]
    w_ptrs = w_ptr + tl.minimum(k, K - 1)[None, :] * (R * S * C) + c[:, None]
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K  # of one filter tap
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(R * S * STEPS):
        tap = step // STEPS
        first_c = step % STEPS * BLOCK_K
        r = tap // S
        s = tap % S
        x_inside = tl.full((BLOCK_M, 1), 1, tl.int1)
        w_inside = tl.full((BLOCK_K, 1), 1, tl.int1)
        if PAD_H > 0:
            x_inside = x_inside & ((h + r >= 0) & (h + r < H))[:, None]
        if PAD_W > 0:
            x_inside = x_inside & ((w + s >= 0) & (w + s < W))[:, None]
        if C % BLOCK_K > 0:
            x_inside = x_inside & (c < C - first_c)[None, :]
            w_inside = (c < C - first_c)[:, None]
        x = tl.load(x_ptrs + ((r * W + s) * PIXEL + first_c), mask=x_inside, other=0.0)
        if in_mean_ptr is not None:
            at = (first_c + c)[None, :]
            mean, s_, b = affine(in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr, at, C, in_eps)
            x = normed(x, x_inside, mean, s_, b, IN_ACT)
        weight = tl.load(w_ptrs + (tap * C + first_c), mask=w_inside, other=0.0)
        acc = dot(x, weight, acc)

    offsets = m.to(tl.int64)[:, None] * K + k[None, :]
    inside = (m < rows)[:, None] & (k < K)[None, :]
    if partials_ptr is not None:
        if residual_ptr is not None:
            acc += load(residual_ptr, offsets, inside)
        y = rounded(acc, y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, y, mask=inside)
        y = tl.where((m < rows)[:, None], y.to(tl.float32), 0.0)
        # rounded: what the mean is off by would shift all its rows when the tiles are merged
        count = tl.minimum(rows - tile * BLOCK_M, BLOCK_M).to(tl.float32)
        mean = tl.div_rn(tl.sum(y, axis=0), count)
        away = tl.where((m < rows)[:, None], y - mean[None, :], 0.0)
        m2 = tl.sum(away * away, axis=0)
        store_partial(partials_ptr, mean, m2, tile, tl.cdiv(rows, BLOCK_M), k, K, k < K)
    else:
        mean, scale, bias = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, k[None, :], K, eps)
        z = normalized(acc, mean, scale, bias)
        if residual_ptr is not None:
            z += load(residual_ptr, offsets, inside)
        tl.store(y_ptr + offsets, rounded(activate(z, ACT), y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pack_kernel(
    x_ptr, y_ptr, pixels, W: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    PAD_W: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[rows, W, C] to [rows, COLUMNS, CHANNELS]; column PAD_W there is column 0 here, zero else."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, CHANNELS)
    row = (pixel // COLUMNS).to(tl.int64)
    w = pixel % COLUMNS - PAD_W
    inside = ((w >= 0) & (w < W) & (pixel < pixels))[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + ((row * W + w) * C)[:, None] + c[None, :], mask=inside, other=0.0)
    offsets = pixel.to(tl.int64)[:, None] * CHANNELS + c[None, :]
    tl.store(y_ptr + offsets, x, mask=(pixel < pixels)[:, None])


def tiles_for(capability: tuple[int, int], filters: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles a GPU of `capability` chooses from, largest first."""
    if dtype == torch.float32:
        return FLOAT32
    if filters <= 64:
        return NARROW
    return SMALL_WIDE if capability in ((8, 6), (8, 9)) or capability >= (12, 0) else WIDE


def _programs(tile: Tile, rows: int, filters: int) -> int:
    return cdiv(rows, tile.block_m) * cdiv(filters, tile.block_n)


def choose(x: torch.Tensor, filters: int, rows: int) -> Tile:
    """The tile for a product of `rows` pixels and `filters` columns in x's type, on its device."""
    tiles = tiles_for(capability(x.device), filters, x.dtype)
    full = (t for t in tiles if _programs(t, rows, filters) >= multiprocessors(x.device))
    return next(full, tiles[-1])


def _pack(x: torch.Tensor, columns: int, padding: int) -> torch.Tensor:
    n, c, h, w = x.shape
    packed = torch.empty((n, h, columns, IMAGE_CHANNELS), dtype=x.dtype, device=x.device)
    pixels = n * h * columns
    sizes = {"W": w, "C": c, "COLUMNS": columns, "PAD_W": padding, "CHANNELS": IMAGE_CHANNELS}
    run(_pack_kernel, (cdiv(pixels, 1024),), x, packed, pixels, **sizes, BLOCK=1024)
    return packed


def packed_image(
    x: torch.Tensor, q: int, s: int, stride: int, padding: int
) -> tuple[torch.Tensor, int, int]:
    """Launch the copy of images x for a convolution of S columns with Q outputs a row: [N, H,
    columns, 4] with the left and right padding in place; returns it, its columns, and how many of
    them a filter row takes as one tap."""
    taps = s + -s % 4  # their channels fill 16-byte loads
    columns = (q - 1) * stride + taps
    columns += columns % 2  # rows start at 16 bytes
    return _pack(x, columns, padding), columns, taps


def convolve(
    h: torch.Tensor | Normed,
    weight: torch.Tensor,
    y: torch.Tensor,
    stride: int,
    padding: int,
    tile: Tile,
    *,
    partials: torch.Tensor | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    act: str = "identity",
) -> None:
    """Launch y = conv(h) [+ residual], with the `partials` of its statistics float32 [2, T, K], one
    a tile of rows; or y = act(norm(conv(h)) [+ residual])."""
    x, weight = stored_h(h), nhwc(weight)
    (_, c, height, w), (k, _, r, s), (n, _, p, q) = x.shape, weight.shape, y.shape
    pad_w, pixel = padding, c
    if c <= IMAGE_CHANNELS:
        x, w, taps = packed_image(x, q, s, stride, padding)
        weight = _pack(weight, taps, 0)
        c, s, pad_w, pixel = taps * IMAGE_CHANNELS, 1, 0, IMAGE_CHANNELS
    in_norm, in_act = norm_arguments(h)
    if isinstance(h, Normed):
        # x passes through registers on its way: more of them, and less of it a step, or they spill
        tile = replace(tile, block_k=min(tile.block_k, 64), warps=8)
    residual = None if residual is None else nhwc(residual)
    args = (x, *in_norm, weight, y, partials, *(norm or NO_NORM), residual, n * p * q)
    sizes = {"H": height, "W": w, "C": c, "K": k, "P": p, "Q": q, "R": r, "S": s}
    steps = {"STRIDE": stride, "PAD_H": padding, "PAD_W": pad_w, "PIXEL": pixel}
    # a power of two that divides C where there is one from 16 up: no masked channels
    block_k = min(tile.block_k, max(16, c & -c))
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": block_k}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    grid = (_programs(tile, n * p * q, k),)
    run(_conv_kernel, grid, *args, **sizes, **steps, IN_ACT=in_act, ACT=act, **blocks, **options)


def empty_output(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    """Uninitialised y [N, K, P, Q] of conv(x), channels-last in x's type."""
    (n, _, h, w), (k, _, r, s) = x.shape, weight.shape
    p, q = conv_out(h, r, stride, padding), conv_out(w, s, stride, padding)
    return empty_nhwc(n, k, p, q, like=x)


def prepared(
    x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, C, H, W] in autocast's type where it is on, weight [K, C, R, S] in x's. Raises
    ValueError for what the kernels do not take."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    check_image("x", x)
    check(weight.dim() == 4, lambda: f"weight must be [K, C, R, S], not {tuple(weight.shape)}")
    check(
        x.device == weight.device,
        lambda: f"x on {x.device} and weight on {weight.device} must be on one device",
    )
    (c, h, w), (k, weight_c, r, s) = x.shape[1:], weight.shape
    check(
        c == weight_c,
        lambda: f"x has {c} channels, weight takes {weight_c}; grouped convolutions are not taken",
    )
    check(
        c % 8 == 0 or 0 < c <= IMAGE_CHANNELS,
        lambda: f"x must have a multiple of 8 channels (or 1 to 4, an image), not {c}",
    )
    check(k % 8 == 0 and k > 0, lambda: f"weight must have a multiple of 8 filters, not {k}")
    check(
        stride >= 1 and padding >= 0,
        lambda: f"stride {stride} must be at least 1, padding {padding} at least 0",
    )
    check(
        h + 2 * padding >= r and w + 2 * padding >= s,
        lambda: f"weight {r}x{s} is larger than x {h}x{w} with padding {padding}",
    )
    return x, weight.to(x.dtype)


def make_conv_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    n, c, h, w, k, r, stride, padding = shape

    def draw(*size: int, deviation: float = 1.0) -> torch.Tensor:
        x = torch.randn(size, generator=generator, device=generator.device) * deviation
        return nhwc(x.to(device, dtype)).requires_grad_()

    weight = draw(k, c, r, r, deviation=(c * r * r) ** -0.5)
    return {"x": draw(n, c, h, w), "weight": weight, "stride": stride, "padding": padding}


def conv_cost(shape: Shape, itemsize: int, residual: bool) -> dict[str, Cost]:
    n, c, h, w, k, r, stride, padding = shape
    outputs = float(n * conv_out(h, r, stride, padding) * conv_out(w, r, stride, padding) * k)
    elements = float(n * c * h * w + k * c * r * r) + outputs * (2 if residual else 1)
    return {"forward": Cost(2 * outputs * c * r * r, elements * itemsize)}

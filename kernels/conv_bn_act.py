"""conv_bn_act: convolution as one implicit matrix product, with BatchNorm's work in its epilogue.

    training    y = conv(x), mean = E[y], var = E[(y - mean)^2] over N, P, Q    (conv_stats)
    inference   y = act(conv(x)*scale + shift [+ residual])                     (conv_bn_act)
    backward    dx, dW of conv_stats by ATen (cuDNN); bn_act's backward holds the training formula,
                so mean and var take no gradient; conv_bn_act has none

The product is [N*P*Q, C*R*S] x [C*R*S, K]; its left operand is never stored, each tile reads the
shifted pixels of x. Traffic: x, W and y once each. The statistics save the pass over y that
BatchNorm makes for them (N*P*Q*K elements); in inference BatchNorm, addition and activation cost
only the reading of the residual. Statistics are those of the rounded y: each tile writes the mean
of its rows and the sum of squares M2 about it, a second kernel merges the tiles in a fixed order
by Chan's formula.

Layout: x [N, C, H, W] and y [N, K, P, Q] channels-last (NHWC), weight [K, C, R, S] channels-last
(KRSC); others are copied once. C and K are multiples of 8: 16-byte loads. Images (C <= 4) are first
copied to 4 channels with their left and right padding in place; then the S pixels of a filter row
are one run of memory, which the kernel takes as S = 1 and C = 4*S (S rounded up to 4: 7 becomes
8). For 7x7/2 on 224x224 in bf16 the copy adds 0.42 MB written and read an image to the 0.30 MB of x
and 1.61 MB of y, and the products are 224 deep instead of 147; 8 channels would be 0.80 MB and
392, and the dense 147 would be read 2 bytes at a time.

Where Triton cannot run the ops are the references below.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.activation import ACTS, REFERENCE, activate
from kernels.bn_stats import merge, store_partial
from kernels.launch import (
    capability,
    cdiv,
    check,
    empty_nhwc,
    multiprocessors,
    nhwc,
    run,
    runs_triton,
    tl,
    triton,
)
from kernels.numerics import dot, rounded
from kernels.shapes import RESNET34, conv_out
from kernels.spec import Cost, Inputs, KernelSpec, Shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IMAGE_CHANNELS = 4  # what C <= 4 is padded to


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


def reference_stats(
    x: torch.Tensor, weight: torch.Tensor, stride: int = 1, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """conv(x) in plain PyTorch, and mean and biased variance per filter of what it rounded to."""
    y = F.conv2d(x, weight, stride=stride, padding=padding)
    wide = y.detach().to(torch.promote_types(y.dtype, torch.float32))
    if wide.shape[0] == 0:
        return y, *wide.new_zeros((2, y.shape[1]))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return y, mean, var


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    act: str = "relu",
) -> torch.Tensor:
    """act(conv(x)*scale + shift + residual) in plain PyTorch; past the convolution in float32."""
    y = F.conv2d(x, weight, stride=stride, padding=padding)
    z = y.to(scale.dtype) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    z = z if residual is None else z + residual
    return REFERENCE[act](z).to(x.dtype)


@triton.jit
def _conv_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    partials_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    rows,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    PIXEL: tl.constexpr,  # elements of x between two columns
    STATS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
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
        weight = tl.load(w_ptrs + (tap * C + first_c), mask=w_inside, other=0.0)
        acc = dot(x, weight, acc)

    offsets = m.to(tl.int64)[:, None] * K + k[None, :]
    inside = (m < rows)[:, None] & (k < K)[None, :]
    if STATS:
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
        scale = tl.load(scale_ptr + k, mask=k < K, other=0.0)
        shift = tl.load(shift_ptr + k, mask=k < K, other=0.0)
        z = acc * scale[None, :] + shift[None, :]
        if HAS_RESIDUAL:
            z += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
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


def _choose(x: torch.Tensor, filters: int, rows: int) -> Tile:
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


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    stride: int,
    padding: int,
    tile: Tile,
    epilogue: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    **flags: bool | str,
) -> None:
    """Launch the product; epilogue = (partials, scale, shift, residual), y for those not used."""
    x, weight = nhwc(x), nhwc(weight)
    (_, c, h, w), (k, _, r, s), (n, _, p, q) = x.shape, weight.shape, y.shape
    pad_w, pixel = padding, c
    if c <= IMAGE_CHANNELS:
        taps = s + -s % 4  # columns a filter row takes: their channels fill 16-byte loads
        w = (q - 1) * stride + taps
        w += w % 2  # rows start at 16 bytes
        x, weight = _pack(x, w, padding), _pack(weight, taps, 0)
        c, s, pad_w, pixel = taps * IMAGE_CHANNELS, 1, 0, IMAGE_CHANNELS
    sizes = {"H": h, "W": w, "C": c, "K": k, "P": p, "Q": q, "R": r, "S": s}
    steps = {"STRIDE": stride, "PAD_H": padding, "PAD_W": pad_w, "PIXEL": pixel}
    # a power of two that divides C where there is one from 16 up: no masked channels
    block_k = min(tile.block_k, max(16, c & -c))
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": block_k}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    args = (x, weight, y, *epilogue, n * p * q)
    grid = (_programs(tile, n * p * q, k),)
    run(_conv_kernel, grid, *args, **sizes, **steps, **flags, **blocks, **options)


def forward_stats(
    x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch y = conv(x) and the merge of its statistics; returns y and float32 [2, K]: means,
    then biased variances (zeros for an empty batch)."""
    y = _empty_output(x, weight, stride, padding)
    k, rows = y.shape[1], y.numel() // y.shape[1]
    if not rows:
        return y, torch.zeros((2, k), dtype=torch.float32, device=x.device)
    tile = tile or _choose(x, k, rows)
    tiles = cdiv(rows, tile.block_m)
    partials = torch.empty((2, tiles, k), dtype=torch.float32, device=x.device)
    flags = {"STATS": True, "HAS_RESIDUAL": False, "ACT": "identity"}
    _convolve(x, weight, y, stride, padding, tile, (partials, y, y, y), **flags)
    return y, merge(partials, rows, tile.block_m)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
    act: str,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Launch y = act(conv(x)*scale + shift + residual)."""
    y = _empty_output(x, weight, stride, padding)
    k, rows = y.shape[1], y.numel() // y.shape[1]
    if rows:
        addend = y if residual is None else nhwc(residual)
        epilogue = (y, scale.contiguous(), shift.contiguous(), addend)
        flags = {"STATS": False, "HAS_RESIDUAL": residual is not None, "ACT": act}
        _convolve(x, weight, y, stride, padding, tile or _choose(x, k, rows), epilogue, **flags)
    return y


def _empty_output(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    (n, _, h, w), (k, _, r, s) = x.shape, weight.shape
    p, q = conv_out(h, r, stride, padding), conv_out(w, s, stride, padding)
    return empty_nhwc(n, k, p, q, like=x)


@torch.library.custom_op("lapis::conv_stats", mutates_args=())
def _stats_op(
    x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if runs_triton(x):
        return forward_stats(x, weight, stride, padding)
    y, mean, var = reference_stats(x, weight, stride, padding)
    return nhwc(y), torch.stack((mean, var))


@_stats_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int):
    y = _empty_output(x, weight, stride, padding)
    return y, x.new_empty((2, y.shape[1]), dtype=torch.float32)


def _save_stats(ctx, inputs, output) -> None:
    x, weight, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight)
    ctx.mark_non_differentiable(output[1])


def _differentiate_stats(ctx, dy, _):
    x, weight = ctx.saved_tensors
    steps, pads, mask = [ctx.stride] * 2, [ctx.padding] * 2, [*ctx.needs_input_grad[:2], False]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        nhwc(dy), x, weight, None, steps, pads, [1, 1], False, [0, 0], 1, mask
    )
    return dx, dw, None, None


_stats_op.register_autograd(_differentiate_stats, setup_context=_save_stats)


@torch.library.custom_op("lapis::conv_bn_act", mutates_args=())
def _op(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
    act: str,
) -> torch.Tensor:
    if runs_triton(x):
        return forward(x, weight, scale, shift, residual, stride, padding, act)
    return nhwc(reference(x, weight, scale, shift, residual, stride, padding, act))


@_op.register_fake
def _(x, weight, scale, shift, residual, stride: int, padding: int, act: str):
    return _empty_output(x, weight, stride, padding)


def _refuse(ctx, dy):
    raise RuntimeError(
        "conv_bn_act is for inference and has no gradient: use conv_stats and bn_act where one "
        "is needed, or torch.no_grad() where none is"
    )


_op.register_autograd(_refuse)


def conv_stats(
    x: torch.Tensor, weight: torch.Tensor, *, stride: int = 1, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolve x [N, C, H, W] with weight [K, C, R, S], which is cast to x's dtype (both to
    autocast's where it is on).

    Returns y [N, K, P, Q] channels-last in that dtype, differentiable in x and weight, and the
    mean and biased variance per filter of the rounded y: float32 [K], without gradients, zeros
    for an empty batch. Raises ValueError on shapes, dtypes and devices the kernels do
    not take: C neither a multiple of 8 nor up to 4, K no multiple of 8, groups, float64.
    """
    x, weight = _prepared(x, weight, stride, padding)
    y, statistics = _stats_op(x, weight, stride, padding)
    return y, statistics[0], statistics[1]


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    act: str = "relu",
) -> torch.Tensor:
    """act(conv(x)*scale + shift [+ residual]) for inference, rounded once: x [N, C, H, W], weight
    [K, C, R, S] cast to x's dtype, scale and shift float32 [K] (see `fold_scale_shift`), residual
    [N, K, P, Q] of x's dtype; returns channels-last [N, K, P, Q].

    Raises ValueError as `conv_stats` does, and where scale, shift, residual or act do not fit;
    RuntimeError when a gradient is asked of the output.
    """
    x, weight = _prepared(x, weight, stride, padding)
    check(act in ACTS, lambda: f"act must be one of {', '.join(ACTS)}, not {act!r}")
    for name, value in (("scale", scale), ("shift", shift)):
        check(
            (value.shape, value.dtype, value.device) == (weight.shape[:1], torch.float32, x.device),
            lambda name=name, value=value: (
                f"{name} {_describe(value)} must be [{weight.shape[0]}] float32 on {x.device}"
            ),
        )
    if residual is not None:
        expected = _empty_output(x.detach().to("meta"), weight, stride, padding).shape
        check(
            (residual.shape, residual.dtype, residual.device) == (expected, x.dtype, x.device),
            lambda: (
                f"residual {_describe(residual)} must be {tuple(expected)} {x.dtype} on {x.device}"
            ),
        )
    return _op(x, weight, scale, shift, residual, stride, padding, act)


def fold_scale_shift(
    weight_bn: torch.Tensor | None,
    bias_bn: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """BatchNorm with running statistics as scale*y + shift, float32 [K]: scale = gamma/sqrt(var +
    eps), shift = beta - mean*scale; gamma and beta are None without affine parameters."""
    scale = torch.rsqrt(running_var.detach().float() + eps)
    if weight_bn is not None:
        scale = scale * weight_bn.detach().float()
    shift = -running_mean.detach().float() * scale
    return scale, shift if bias_bn is None else shift + bias_bn.detach().float()


def _prepared(
    x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    check(x.dim() == 4, lambda: f"x must be [N, C, H, W], not {tuple(x.shape)}")
    check(weight.dim() == 4, lambda: f"weight must be [K, C, R, S], not {tuple(weight.shape)}")
    check(
        x.device == weight.device,
        lambda: f"x on {x.device} and weight on {weight.device} must be on one device",
    )
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    check(x.dtype in DTYPES, lambda: f"x must be bfloat16, float16 or float32, not {x.dtype}")
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


def _describe(x: torch.Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    n, c, h, w, k, r, stride, padding = shape

    def draw(*size: int, deviation: float = 1.0) -> torch.Tensor:
        x = torch.randn(size, generator=generator, device=generator.device) * deviation
        return nhwc(x.to(device, dtype)).requires_grad_()

    weight = draw(k, c, r, r, deviation=(c * r * r) ** -0.5)
    return {"x": draw(n, c, h, w), "weight": weight, "stride": stride, "padding": padding}


def _make_inference_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    inputs = _make_inputs(shape, dtype, device, generator)
    x, weight = (inputs[name].detach() for name in ("x", "weight"))
    y_shape = _empty_output(x.to("meta"), weight, inputs["stride"], inputs["padding"]).shape

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device).to(device)

    scale, shift = draw(y_shape[1]), draw(y_shape[1])
    residual = nhwc(draw(*y_shape).to(dtype))
    return {**inputs, "x": x, "weight": weight, "scale": scale, "shift": shift,
            "residual": residual}  # fmt: skip


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
) -> None:
    forward(x, weight, scale, shift, residual, stride, padding, "relu")


def _cost(shape: Shape, itemsize: int, residual: bool) -> dict[str, Cost]:
    n, c, h, w, k, r, stride, padding = shape
    outputs = float(n * conv_out(h, r, stride, padding) * conv_out(w, r, stride, padding) * k)
    elements = float(n * c * h * w + k * c * r * r) + outputs * (2 if residual else 1)
    return {"forward": Cost(2 * outputs * c * r * r, elements * itemsize)}


def _stats_cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    return _cost(shape, itemsize, residual=False)


def _inference_cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    return _cost(shape, itemsize, residual=True)


# [N, C, H, W, K, R, stride, padding] at batch 32
SITES = tuple((32, s.c, s.h, s.w, s.k, s.r, s.stride, s.padding) for s in RESNET34)
SPEC = KernelSpec(
    "conv_stats", reference_stats, conv_stats, _make_inputs, forward_stats, _stats_cost, SITES
)
INFERENCE_SPEC = KernelSpec(
    "conv_bn_act", reference, conv_bn_act, _make_inference_inputs, _launch, _inference_cost, SITES
)

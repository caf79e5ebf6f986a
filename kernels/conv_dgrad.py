"""conv_dgrad: the data gradient of a convolution, with the BatchNorm work on both of its sides.

    prologue   dy = A*dz' + B*(x' - mean') + C   of the BatchNorm after it, see `conv_prologue`
    product    dx = conv_transpose(dy, W)
    epilogue   dz = (dx + fork)*act'(z)          rounded once; h = act(z), z = norm(x) [+ residual],
                                                 was the convolution's input
               S1 = sum dz   S2 = sum dz*(x - mean)   [S2 of a residual r: sum dz*(r - r_mean)]

Prologue, fork and epilogue are each left out where they are not asked for. Traffic: dy (with the
prologue dz' and x'), W and dx once each; the fork, x and the mask or raw residual are read. Saved
are passes of their own that read and write N*C*H*W elements: the fork's addition, the activation's
backward with the sums; and with the prologue writing dy and reading it.

The product is [N*H*W, K*R*S] x [K*R*S, C], its left operand never stored. Since h = p*stride -
padding + r, a pixel meets every stride-th tap only: the stride^2 classes of pixels (parities, for
stride 2) are products of their own within one launch, each over its own taps. 3x3 with stride 2 has
4, 2, 2 and 1 taps, 1x1 has 1, 0, 0 and 0; the heaviest class comes first. Weights are read where
they lie, a tap at a time.

Layouts: see `conv_gemm`. Images (C <= 4) are refused: training takes no gradient of them. Where
Triton cannot run the op is `reference`.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from kernels.activation import REFERENCE_BACKWARD
from kernels.bn_checks import Norm
from kernels.bn_sums import affine, kind_of, load, preactivation
from kernels.bn_sums import gradient as through_activation
from kernels.conv_gemm import SITES, Tile, choose, conv_cost, make_conv_inputs
from kernels.conv_prologue import (
    Gradient,
    gradient,
    gradient_arguments,
    load_coefficients,
    stored_dy,
)
from kernels.launch import (
    cdiv,
    check,
    check_image,
    describe,
    empty_nhwc,
    nhwc,
    run,
    runs_triton,
    tl,
    triton,
)
from kernels.numerics import dot, rounded
from kernels.shapes import conv_out
from kernels.spec import Cost, Inputs, KernelSpec, Shape


class Before(NamedTuple):
    """The unit that made the convolution's input h = act(z), z = norm(x) [+ residual].

    x, residual: [N, C, H, W]; the residual is raw where it has an `r_norm` of its own.
    mask: uint8 [N*H*W, C/8], bit j of byte i set where z > 0 in channel 8*i + j. Then z is not
        computed from x and residual; act is one of `activation.MASK_ACTS`.
    """

    x: torch.Tensor
    norm: Norm
    act: str
    residual: torch.Tensor | None = None
    r_norm: Norm | None = None
    mask: torch.Tensor | None = None


def reference(
    dy: torch.Tensor | Gradient,
    weight: torch.Tensor,
    size: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    fork: torch.Tensor | None = None,
    before: Before | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx and None, or with `before` dz and its sums [2, C] ([3, C] with r_norm), in plain PyTorch:
    float32 (float64 of float64) between the roundings that the kernel makes."""
    dtype, wide = weight.dtype, torch.promote_types(weight.dtype, torch.float32)

    def column(t: torch.Tensor) -> torch.Tensor:
        return t.to(wide).view(-1, 1, 1)

    if isinstance(dy, Gradient):
        a, b, c = map(column, dy.coefficients)
        dy = (a * dy.dz.to(wide) + b * (dy.x.to(wide) - column(dy.mean)) + c).to(dtype)
    shape = (dy.shape[0], weight.shape[1], *size)
    if fork is None and before is None:
        return torch.nn.grad.conv2d_input(shape, weight, dy, stride, padding), None
    dx = torch.nn.grad.conv2d_input(shape, weight.to(wide), dy.to(wide), stride, padding)
    dx = dx if fork is None else dx + fork.to(wide)
    if before is None:
        return dx.to(dtype), None

    z, centred = 0, []
    for x, norm in ((before.x, before.norm), (before.residual, before.r_norm)):
        if norm is not None:
            centred.append(x.to(wide) - column(norm.mean))
            gain = column(norm.weight) * (column(norm.var) + norm.eps).rsqrt()
            x = centred[-1] * gain + column(norm.bias)
        z = z if x is None else z + x
    if before.mask is not None:
        bits = before.mask[:, :, None] >> torch.arange(8, device=weight.device) & 1
        z = bits.view(shape[0], *size, -1).permute(0, 3, 1, 2) * 2 - 1
    dz = REFERENCE_BACKWARD[before.act](dx, z.to(dtype).to(wide)).to(dtype)
    sums = [dz.to(wide), *(dz.to(wide) * away for away in centred)]
    return dz, torch.stack([t.sum((0, 2, 3)) for t in sums])


@triton.jit
def _sign(
    mask_ptr, pixel, there, first, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """[BLOCK_M, BLOCK_N] of 1 where the pixel's bit is set, -1 elsewhere, channels from `first`."""
    byte = first // 8 + tl.arange(0, BLOCK_N // 8)[None, :]
    inside = there[:, None] & (byte < C // 8)
    at = pixel.to(tl.int64)[:, None] * (C // 8) + byte
    bits = tl.load(mask_ptr + at, mask=inside, other=0).to(tl.int32)
    bits = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, (BLOCK_M, BLOCK_N)) == 1, 1.0, -1.0)


@triton.jit
def _finish(
    dx, dx_ptr, fork_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps,
    r_ptr, r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, r_eps, mask_ptr,
    partials_ptr, partial, plane, pixel, there, first,
    C: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of dx [BLOCK_M, BLOCK_N]: rows are pixels, columns the channels from `first`."""
    c = first + tl.arange(0, BLOCK_N)
    cols = c[None, :]
    inside = there[:, None] & (cols < C)
    offsets = pixel.to(tl.int64)[:, None] * C + cols
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    if fork_ptr is not None:
        dx += load(fork_ptr, offsets, inside)
    if x_ptr is None:
        tl.store(dx_ptr + offsets, rounded(dx, DTYPE), mask=inside)
    else:
        x = load(x_ptr, offsets, inside)
        r = load(r_ptr, offsets, inside) if RESIDUAL != "none" else x
        mean, s, b = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, C, eps)
        r_mean, r_s, r_b = affine(r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, cols, C, r_eps)
        if mask_ptr is not None:
            z = _sign(mask_ptr, pixel, there, first, C, BLOCK_M, BLOCK_N)
        else:
            z = preactivation(x, mean, s, b, r, r_mean, r_s, r_b, RESIDUAL, DTYPE)
        dz = rounded(through_activation(dx, z, ACT), DTYPE)
        tl.store(dx_ptr + offsets, dz, mask=inside)
        dz = tl.where(inside, dz.to(tl.float32), 0.0)
        at = partials_ptr + partial + c
        tl.store(at, tl.sum(dz, axis=0), mask=c < C)
        tl.store(at + plane, tl.sum(dz * (x - mean), axis=0), mask=c < C)
        if RESIDUAL == "norm":
            tl.store(at + 2 * plane, tl.sum(dz * (r - r_mean), axis=0), mask=c < C)


@triton.jit
def _data_gradient_kernel(
    dy_ptr, dy_x_ptr, dy_mean_ptr, coefficients_ptr, w_ptr, dx_ptr, fork_ptr,
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps,
    r_ptr, r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, r_eps, mask_ptr,
    partials_ptr, rows,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # channels run fastest: the programs that read one stretch of dy run together, W stays in L2
    tile = tl.program_id(0) // tl.cdiv(C, BLOCK_N)
    first_c = tl.program_id(0) % tl.cdiv(C, BLOCK_N) * BLOCK_N
    tiles = tl.cdiv(rows, BLOCK_M)  # of one parity
    # a parity is numbered by the first of its taps: the earlier that is, the more there are
    parity = tile // tiles if STRIDE > 1 else 0
    first_r = parity // STRIDE
    first_s = parity % STRIDE
    r_taps = (R - first_r + STRIDE - 1) // STRIDE
    s_taps = (S - first_s + STRIDE - 1) // STRIDE

    # p and q of the parity's first tap, of which h and w follow; the t-th tap reads p - t
    HEIGHT: tl.constexpr = (H + STRIDE - 1) // STRIDE
    WIDTH: tl.constexpr = (W + STRIDE - 1) // STRIDE
    m = (tile - parity * tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    # past the end the last row is computed again: no mask for it in the loop
    i = tl.minimum(m, rows - 1)
    n = i // (HEIGHT * WIDTH)
    p = i // WIDTH % HEIGHT + (PAD - first_r + STRIDE - 1) // STRIDE
    q = i % WIDTH + (PAD - first_s + STRIDE - 1) // STRIDE
    h = p * STRIDE + first_r - PAD
    w = q * STRIDE + first_s - PAD
    k = tl.arange(0, BLOCK_K)
    c = first_c + tl.arange(0, BLOCK_N)
    dy_at = (((n * P + p) * Q + q).to(tl.int64) * K)[:, None] + k[None, :]
    w_ptrs = w_ptr + (k * (R * S * C))[:, None] + c[None, :]
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K  # of one tap
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(r_taps * s_taps * STEPS):
        tap = step // STEPS
        first_k = step % STEPS * BLOCK_K
        r = tap // tl.maximum(s_taps, 1)  # a division may run before it is known that taps exist
        s = tap % tl.maximum(s_taps, 1)
        dy_inside = tl.full((BLOCK_M, 1), 1, tl.int1)
        w_inside = tl.full((BLOCK_K, 1), 1, tl.int1)
        if R > 1 or PAD > 0:
            dy_inside = dy_inside & ((p - r >= 0) & (p - r < P))[:, None]
        if S > 1 or PAD > 0:
            dy_inside = dy_inside & ((q - s >= 0) & (q - s < Q))[:, None]
        if K % BLOCK_K > 0:
            dy_inside = dy_inside & (k < K - first_k)[None, :]
            w_inside = (k < K - first_k)[:, None]
        if C % BLOCK_N > 0:
            w_inside = w_inside & (c < C)[None, :]
        at = dy_at + (first_k - (r * Q + s) * K)
        dy = tl.load(dy_ptr + at, mask=dy_inside, other=0.0)
        if coefficients_ptr is not None:
            dy_x = tl.load(dy_x_ptr + at, mask=dy_inside, other=0.0)
            cols = (first_k + k)[None, :]
            mean, a, b, constant = load_coefficients(dy_mean_ptr, coefficients_ptr, cols, K)
            dy = gradient(dy, dy_x, dy_inside, mean, a, b, constant)
        w_tap = (r * STRIDE + first_r) * S + s * STRIDE + first_s
        weight = tl.load(w_ptrs + (first_k * (R * S) + w_tap) * C, mask=w_inside, other=0.0)
        acc = dot(dy, weight, acc)

    there = (m < rows) & (h < H) & (w < W)  # where STRIDE divides no H, a parity may be a row short
    pixel = (n * H + h) * W + w
    plane = tiles * (STRIDE * STRIDE * C)
    # half of the channels at a time: with x, r and z of all there are not enough registers
    halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    for half in tl.static_range(2):
        _finish(
            left if half == 0 else right,
            dx_ptr, fork_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps,
            r_ptr, r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, r_eps, mask_ptr,
            partials_ptr, tile * C, plane, pixel, there, first_c + half * (BLOCK_N // 2),
            C, ACT, RESIDUAL, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip


def data_gradient(
    dy: torch.Tensor | Gradient,
    weight: torch.Tensor,
    size: tuple[int, int],
    stride: int,
    padding: int,
    *,
    fork: torch.Tensor | None = None,
    before: Before | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the data gradient of a convolution of h [N, C, *size] with weight [K, C, R, S].

    dy: [N, K, P, Q], stored or made on load. fork: [N, C, *size], what more flows into h.
    Returns dx [N, C, *size], channels-last, and None; or with `before` dz and the partial sums
    float32 [2, T, C], S1 and S2 of T tiles of pixels, or [3, T, C] with r_norm.
    """
    dz, weight = stored_dy(dy), nhwc(weight)
    (n, k, p, q), (_, c, r, s), (h, w) = dz.shape, weight.shape, size
    dx = empty_nhwc(n, c, h, w, like=dz)
    if tile is None:
        tile = choose(dz, c, n * h * w)
        if isinstance(dy, Gradient):  # dy is made in registers: with 4 warps there are not enough
            tile = replace(tile, block_k=min(tile.block_k, 64), warps=8)
    rows = n * cdiv(h, stride) * cdiv(w, stride)  # of one parity
    tiles = stride * stride * cdiv(rows, tile.block_m)
    partials, act, kind, unit = None, "identity", "none", (None,) * 13
    if before is not None:
        _, norm, act, residual, r_norm, mask = before
        kind = kind_of(residual, r_norm)
        residual = None if residual is None else nhwc(residual)
        unit = (nhwc(before.x), *norm, residual, *(r_norm or norm), mask)
        sums = 3 if kind == "norm" else 2
        partials = torch.empty((sums, tiles, c), dtype=torch.float32, device=dz.device)
    if not rows:
        return dx, partials
    fork = None if fork is None else nhwc(fork)
    sizes = {"H": h, "W": w, "C": c, "K": k, "P": p, "Q": q, "R": r, "S": s}
    steps = {"STRIDE": stride, "PAD": padding}
    flags = {"ACT": act, "RESIDUAL": kind}
    # a power of two that divides K where there is one from 16 up: no masked filters
    block_k = min(tile.block_k, max(16, k & -k))
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": block_k}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if isinstance(dy, Gradient):
        options["maxnreg"] = 255  # left alone, ptxas may aim at 128 and spill
    args = (dz, *gradient_arguments(dy), weight, dx, fork, *unit, partials, rows)
    grid = (tiles * cdiv(c, tile.block_n),)
    run(_data_gradient_kernel, grid, *args, **sizes, **steps, **flags, **blocks, **options)
    return dx, partials


@torch.library.custom_op("lapis::conv_dgrad", mutates_args=())
def _op(
    dy: torch.Tensor, weight: torch.Tensor, size: list[int], stride: int, padding: int
) -> torch.Tensor:
    if runs_triton(dy):
        return data_gradient(dy, weight, size, stride, padding)[0]
    return nhwc(reference(dy, weight, size, stride, padding)[0])


@_op.register_fake
def _(dy, weight, size, stride, padding):
    return empty_nhwc(dy.shape[0], weight.shape[1], *size, like=dy)


def _refuse(ctx, ddx):
    raise RuntimeError(
        "conv_dgrad is a gradient and has none of its own: second derivatives need "
        "torch.nn.grad.conv2d_input"
    )


_op.register_autograd(_refuse)


def conv_dgrad(
    dy: torch.Tensor,
    weight: torch.Tensor,
    size: tuple[int, int],
    *,
    stride: int = 1,
    padding: int = 0,
) -> torch.Tensor:
    """The gradient of conv(x, weight) in x [N, C, *size], given that in its output.

    dy: [N, K, P, Q]. weight: [K, C, R, S], cast to dy's dtype. C and K are multiples of 8.
    Returns channels-last [N, C, *size] in dy's dtype. Raises ValueError on shapes, dtypes and
    devices the kernel does not take, RuntimeError when a gradient of the result is asked for.
    """
    check_image("dy", dy)
    check(weight.dim() == 4, lambda: f"weight must be [K, C, R, S], not {tuple(weight.shape)}")
    check(
        dy.device == weight.device,
        lambda: f"dy on {dy.device} and weight on {weight.device} must be on one device",
    )
    k, c, r, s = weight.shape
    check(dy.shape[1] == k, lambda: f"dy {describe(dy)} must have weight's {k} filters as channels")
    check(k % 8 == 0 and k > 0, lambda: f"weight must have a multiple of 8 filters, not {k}")
    check(
        c % 8 == 0 and c > 0,
        lambda: (
            f"weight must take a multiple of 8 channels, not {c}: training needs no gradient "
            "of an image, torch.nn.grad.conv2d_input makes it"
        ),
    )
    check(
        stride >= 1 and padding >= 0,
        lambda: f"stride {stride} must be at least 1, padding {padding} at least 0",
    )
    p, q = conv_out(size[0], r, stride, padding), conv_out(size[1], s, stride, padding)
    check(
        dy.shape[2:] == (p, q),
        lambda: (
            f"dy {describe(dy)} must be {p}x{q}, what {r}x{s} taps make of {size[0]}x{size[1]} "
            f"with stride {stride} and padding {padding}"
        ),
    )
    return _op(dy, weight.to(dy.dtype), list(size), stride, padding)


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    n, _, h, w, k, r, stride, padding = shape
    weight = make_conv_inputs(shape, dtype, device, generator)["weight"].detach()
    p, q = conv_out(h, r, stride, padding), conv_out(w, r, stride, padding)
    dy = torch.randn((n, k, p, q), generator=generator, device=generator.device).to(device, dtype)
    return {"dy": nhwc(dy), "weight": weight, "size": (h, w), "stride": stride, "padding": padding}


def _launch(
    dy: torch.Tensor, weight: torch.Tensor, size: tuple[int, int], stride: int, padding: int
) -> None:
    (n, k), c, (h, w) = dy.shape[:2], weight.shape[1], size
    x = empty_nhwc(n, c, h, w, like=dy)
    mask = dy.new_empty((n * h * w, c // 8), dtype=torch.uint8)
    found = dy.new_empty((3, k), dtype=torch.float32)
    norm = Norm(*dy.new_empty((4, c), dtype=torch.float32), 1e-5)
    inner = Before(x, norm, "relu")
    outer = Before(x, norm, "relu", mask=mask)
    joined = Before(x, norm, "relu", x, norm)
    data_gradient(dy, weight, size, stride, padding, fork=x)
    for given in (dy, Gradient(dy, dy, found[0], found)):
        data_gradient(given, weight, size, stride, padding)
        data_gradient(given, weight, size, stride, padding, before=inner)
        data_gradient(given, weight, size, stride, padding, fork=x, before=outer)
        data_gradient(given, weight, size, stride, padding, fork=x, before=joined)


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    return conv_cost(shape, itemsize, residual=False)


# the stem takes an image
SPEC = KernelSpec("conv_dgrad", reference, conv_dgrad, _make_inputs, _launch, _cost, SITES[1:])

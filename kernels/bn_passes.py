"""The passes of bn_act over whole tensors, and its backward: `sums`, `coefficients`, `apply`. The
equations, the traffic and the layout stand in bn_act.py, the reductions in bn_sums.py, whose
conventions hold here.
"""

import torch

from kernels.activation import activate
from kernels.bn_checks import Norm
from kernels.bn_stats import Tile, tile_position
from kernels.bn_sums import (
    affine,
    coefficients,
    frozen,
    gradient,
    kind_of,
    load,
    mask_position,
    preactivation,
    sums,
)
from kernels.launch import cdiv, empty_nhwc, nhwc, run, tl, triton
from kernels.numerics import rounded

# by bytes of an element
FORWARD = {2: Tile(4096, 4), 4: Tile(2048, 4)}
APPLY = {2: Tile(2048, 4), 4: Tile(2048, 4)}


def keeps_mask(act: str, kind: str) -> bool:
    """Whether the backward needs the mask of z > 0, since z cannot be recomputed from x alone."""
    return kind == "add" and act in ("relu", "leaky_relu")


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps,
    r_ptr, r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, r_eps,
    y_ptr, mask_ptr,
    m, c,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, rows, channels = tile_position(c, BLOCK_M, BLOCK_C)
    cols = channels[None, :]
    mean, s, b = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, c, eps)
    r_mean, r_s, r_b = affine(r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, cols, c, r_eps)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    first = tile.to(tl.int64) * BLOCK_M * c
    offsets = rows * c + cols
    inside = (rows < m - tile * BLOCK_M) & (cols < c)
    x = load(x_ptr + first, offsets, inside)
    r = load(r_ptr + first, offsets, inside) if RESIDUAL != "none" else x
    z = preactivation(x, mean, s, b, r, r_mean, r_s, r_b, RESIDUAL, DTYPE)
    tl.store(y_ptr + first + offsets, rounded(activate(z, ACT), DTYPE), mask=inside)
    if mask_ptr is not None:
        # eight neighbouring channels, the 16 bytes of bf16 that one thread holds, make a byte
        bits = tl.reshape((z > 0).to(tl.int32), (BLOCK_M, BLOCK_C // 8, 8))
        bits = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
        at, kept = mask_position(tile, rows, m, c, BLOCK_M, BLOCK_C)
        tl.store(mask_ptr + at, bits.to(tl.uint8), mask=kept)


@triton.jit
def _store_gradient(ptr, coefficients_ptr, dz, centred, more, offsets, inside, cols, c):
    a = load(coefficients_ptr, cols, cols < c)
    b = load(coefficients_ptr + c, cols, cols < c)
    constant = load(coefficients_ptr + 2 * c, cols, cols < c)
    dx = rounded(a * dz + b * centred + constant + more, ptr.dtype.element_ty)
    tl.store(ptr + offsets, dx, mask=inside)


@triton.jit
def _apply_kernel(
    dy_ptr,
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps,
    r_ptr, r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, r_eps,
    more_ptr, coefficients_ptr, dx_ptr, dr_ptr,
    m, c,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, rows, channels = tile_position(c, BLOCK_M, BLOCK_C)
    tile = tl.cdiv(m, BLOCK_M) - 1 - tile  # from the end: what the sums read last is in the L2
    cols = channels[None, :]
    mean, s, b = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, c, eps)
    r_mean, r_s, r_b = affine(r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, cols, c, r_eps)
    first = tile.to(tl.int64) * BLOCK_M * c
    offsets = rows * c + cols
    inside = (rows < m - tile * BLOCK_M) & (cols < c)
    dy = load(dy_ptr + first, offsets, inside)
    x = load(x_ptr + first, offsets, inside)
    r = load(r_ptr + first, offsets, inside) if RESIDUAL != "none" else x
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    dz = gradient(dy, preactivation(x, mean, s, b, r, r_mean, r_s, r_b, RESIDUAL, DTYPE), ACT)
    more = load(more_ptr + first, offsets, inside) if more_ptr is not None else 0.0
    _store_gradient(dx_ptr + first, coefficients_ptr, dz, x - mean, more, offsets, inside, cols, c)
    if RESIDUAL == "norm":
        r_coefficients = coefficients_ptr + 3 * c
        _store_gradient(
            dr_ptr + first, r_coefficients, dz, r - r_mean, 0.0, offsets, inside, cols, c
        )


def empty_outputs(x: torch.Tensor, kind: str, act: str) -> tuple[torch.Tensor, torch.Tensor]:
    n, c, h, w = x.shape
    size = (n * h * w, -(-c // 8)) if keeps_mask(act, kind) else (0,)
    return empty_nhwc(n, c, h, w, like=x), x.new_empty(size, dtype=torch.uint8)


def forward(
    x: torch.Tensor, norm: Norm, residual: torch.Tensor | None, r_norm: Norm | None, act: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch y = act(...); returns y [N, C, H, W], channels-last, and the mask uint8
    [N*H*W, ceil(C/8)] (empty if the backward needs none)."""
    x = nhwc(x)
    n, c, h, w = x.shape
    m, kind = n * h * w, kind_of(residual, r_norm)
    y, mask = empty_outputs(x, kind, act)
    tile = FORWARD[x.element_size()]
    block_m, block_c = tile.blocks(c)
    run(
        _forward_kernel,
        (cdiv(m, block_m) * cdiv(c, block_c),),
        *(x, *norm),
        *(None if residual is None else nhwc(residual), *(r_norm or norm)),
        *(y, mask if keeps_mask(act, kind) else None, m, c),
        ACT=act,
        RESIDUAL=kind,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=tile.warps,
    )
    return y, mask


def apply(
    dz: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    found: torch.Tensor,
    r: torch.Tensor | None = None,
    r_norm: Norm | None = None,
    act: str = "identity",
    more: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch dx = A*dz + B*(x - mean) + C [+ more] with the `found` coefficients [3, C], and with a
    raw residual r and its norm ([6, C]) the same for r, without `more`.

    dz: [N, C, H, W] of x's dtype, what `sums` kept; or dy, with the `act` whose derivative at
        z = norm(x) [+ r_norm(r)] is still to be taken.
    more: what reaches x past the norm, [N, C, H, W] of x's dtype; added in float32.
    Returns dx and dr (None without r) [N, C, H, W], channels-last.
    """
    x = nhwc(x)
    n, c, h, w = x.shape
    m = n * h * w
    dx = empty_nhwc(*x.shape, like=x)
    dr = None if r_norm is None else empty_nhwc(*x.shape, like=x)
    tile = APPLY[x.element_size()]
    block_m, block_c = tile.blocks(c)
    run(
        _apply_kernel,
        (cdiv(m, block_m) * cdiv(c, block_c),),
        *(nhwc(dz), x, *norm),
        *(None if r is None else nhwc(r), *(r_norm or norm)),
        *(None if more is None else nhwc(more), found, dx, dr, m, c),
        ACT=act,
        RESIDUAL=kind_of(r, r_norm),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=tile.warps,
    )
    return dx, dr


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    residual: torch.Tensor | None,
    r_norm: Norm | None,
    mask: torch.Tensor | None,
    act: str,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Launch all gradients; `residual` and `mask` are what was saved of an added residual.

    Returns dx and dresidual [N, C, H, W], channels-last (dresidual is None where there is none or
    it is dy), and float32 [2, C] dweight, dbias, or [4, C] with those of the residual's norm below.
    """
    dy, x, m = nhwc(dy), nhwc(x), x.numel() // x.shape[1]
    if not training:
        dx, dr, partials = frozen(dy, x, norm, act, residual, r_norm, mask)
        return dx, dr, coefficients(partials, m, norm, r_norm)[0]
    dz, partials = sums(dy, x, norm, act, residual, r_norm, mask)
    dparams, found = coefficients(partials, m, norm, r_norm)
    if dz is not None:
        return apply(dz, x, norm, found)[0], dz, dparams
    return *apply(dy, x, norm, found, residual, r_norm, act), dparams

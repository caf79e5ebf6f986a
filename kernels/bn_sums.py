"""The reductions of a BatchNorm's backward, for bn_act, bn_act_pool and the trunk; the equations
and the layout stand in bn_act.py.

    sums          dz where it is kept, and partials float32 [2, P, C]: S1 and S2 of P slices of the
                  rows; [3, P, C] with the S2 of the residual's BatchNorm last
    frozen        the same with constant statistics, where dx = s*dz needs no sums: one pass
    coefficients  partials -> dweight, dbias, and A, B, C of dx = A*dz + B*(x - mean) + C

`coefficients` takes partials from anywhere, a convolution's epilogue leaves one a tile: thousands
of them are first folded to FOLDED. Every order of summation is fixed.

A tensor is read as [M, C], M = N*H*W. `r` is the residual, `RESIDUAL` how it enters z: "none",
"add", or "norm" with a BatchNorm of its own. Pointers to the parameters of a norm that is not
there are handed those of x; a tensor that is not there is None.
"""

import torch

from kernels.activation import activate_grad
from kernels.bn_checks import Norm
from kernels.bn_stats import (
    FOLD_ABOVE,
    FOLD_CHANNELS,
    FOLD_PARTIALS,
    FOLDED,
    MERGE_CHANNELS,
    MERGE_PARTIALS,
    Tile,
    tile_position,
)
from kernels.launch import cdiv, empty_nhwc, next_power_of_2, nhwc, run, tl, triton
from kernels.numerics import rounded

SUMS = {2: Tile(2048, 4, 8), 4: Tile(2048, 4, 8)}  # by bytes of an element


def kind_of(residual: torch.Tensor | None, r_norm: object | None) -> str:
    """How the residual enters z: "none", "add" or "norm" (with a BatchNorm of its own)."""
    if residual is None:
        return "none"
    return "add" if r_norm is None else "norm"


@triton.jit
def load(ptr, offsets, inside):
    """A block in float32, zero outside."""
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, c, eps):
    """mean, s and bias of channels `cols` of (x - mean)*s + bias."""
    s = load(weight_ptr, cols, cols < c) * tl.rsqrt(load(var_ptr, cols, cols < c) + eps)
    return load(mean_ptr, cols, cols < c), s, load(bias_ptr, cols, cols < c)


@triton.jit
def normalized(x, mean, s, b):
    """(x - mean)*s + b: s*x + (b - mean*s) cancels where |mean| is far above the standard
    deviation. An explicit fma, so that every pass sees the same bits."""
    return tl.fma(x - mean, s, b)


@triton.jit
def preactivation(x, mean, s, b, r, r_mean, r_s, r_b, RESIDUAL: tl.constexpr, DTYPE: tl.constexpr):
    """z, rounded to the storage type as eager's."""
    z = normalized(x, mean, s, b)
    if RESIDUAL == "add":
        z += r
    elif RESIDUAL == "norm":
        z += normalized(r, r_mean, r_s, r_b)
    return rounded(z, DTYPE).to(tl.float32)


@triton.jit
def gradient(dy, z, ACT: tl.constexpr):
    """dy*act'(z)."""
    if ACT != "identity":
        dy = dy * activate_grad(z, ACT)
    return dy


@triton.jit
def mask_position(tile, rows, m, c, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a tile's bytes in the mask [M, ceil(C/8)], and which of them exist."""
    width = tl.cdiv(c, 8)
    column = (tl.program_id(0) % tl.cdiv(c, BLOCK_C)) * (BLOCK_C // 8)
    column += tl.arange(0, BLOCK_C // 8)[None, :]
    inside = (rows < m - tile * BLOCK_M) & (column < width)
    return tile.to(tl.int64) * BLOCK_M * width + rows * width + column, inside


@triton.jit
def _sign(mask_ptr, tile, rows, m, c, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """1 where the mask says z > 0, else -1: [BLOCK_M, BLOCK_C]."""
    at, kept = mask_position(tile, rows, m, c, BLOCK_M, BLOCK_C)
    bits = tl.load(mask_ptr + at, mask=kept, other=0).to(tl.int32)[:, :, None]
    bits = (bits >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, (BLOCK_M, BLOCK_C)) == 1, 1.0, -1.0)


@triton.jit
def _sums_kernel(
    dy_ptr, dy2_ptr,
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps,
    r_ptr, r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, r_eps,
    mask_ptr, dz_ptr, dx_ptr, dr_ptr, partials_ptr,
    m, c, programs,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, rows, channels = tile_position(c, BLOCK_M, BLOCK_C)
    cols = channels[None, :]
    mean, s, b = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, c, eps)
    r_mean, r_s, r_b = affine(r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, cols, c, r_eps)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    offsets = rows * c + cols
    s1 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    r_s2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for k in range(tl.cdiv(tl.cdiv(m, BLOCK_M) - program, programs)):
        tile = program + k * programs
        first = tile.to(tl.int64) * BLOCK_M * c
        inside = (rows < m - tile * BLOCK_M) & (cols < c)
        dy = load(dy_ptr + first, offsets, inside)
        if dy2_ptr is not None:
            dy += load(dy2_ptr + first, offsets, inside)
        x = load(x_ptr + first, offsets, inside)
        r = load(r_ptr + first, offsets, inside) if RESIDUAL != "none" else x
        if mask_ptr is not None:
            z = _sign(mask_ptr, tile, rows, m, c, BLOCK_M, BLOCK_C)
        else:
            z = preactivation(x, mean, s, b, r, r_mean, r_s, r_b, RESIDUAL, DTYPE)
        dz = gradient(dy, z, ACT)
        if dz_ptr is not None:
            # the sums and the second pass use the same, rounded dz
            stored = rounded(dz, DTYPE)
            tl.store(dz_ptr + first + offsets, stored, mask=inside)
            dz = stored.to(tl.float32)
        s1 += dz
        s2 += dz * (x - mean)
        if RESIDUAL == "norm":
            r_s2 += dz * (r - r_mean)
        if dx_ptr is not None:
            tl.store(dx_ptr + first + offsets, rounded(dz * s, DTYPE), mask=inside)
        if dr_ptr is not None:
            tl.store(dr_ptr + first + offsets, rounded(dz * r_s, DTYPE), mask=inside)
    at = partials_ptr + program * c + channels
    tl.store(at, tl.sum(s1, axis=0), mask=channels < c)
    tl.store(at + programs * c, tl.sum(s2, axis=0), mask=channels < c)
    if RESIDUAL == "norm":
        tl.store(at + 2 * programs * c, tl.sum(r_s2, axis=0), mask=channels < c)


@triton.jit
def _partial_sum(partials_ptr, p, partials, channels, c):
    """Sum [BLOCK_C] of the partials number p [BLOCK_P] of one statistic [P, C]."""
    inside = (p < partials)[:, None] & (channels < c)[None, :]
    at = p.to(tl.int64)[:, None] * c + channels[None, :]
    return tl.sum(tl.load(partials_ptr + at, mask=inside, other=0.0), axis=0)


@triton.jit
def _fold_kernel(
    partials_ptr, folded_ptr, c, partials, groups, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Group g of one statistic's partials, g, g + groups, g + 2*groups ...: their sum."""
    columns = tl.cdiv(c, BLOCK_C)
    group = tl.program_id(0) // columns
    channels = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    statistic = tl.program_id(1)
    partials_ptr += statistic * partials * c
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(group, partials, BLOCK_P * groups):
        p = first + tl.arange(0, BLOCK_P) * groups
        total += _partial_sum(partials_ptr, p, partials, channels, c)
    tl.store(folded_ptr + (statistic * groups + group) * c + channels, total, mask=channels < c)


@triton.jit
def _store_coefficients(
    s1, s2, weight_ptr, var_ptr, eps, dparams_ptr, coefficients_ptr, m, channels, c
):
    inv = tl.rsqrt(load(var_ptr, channels, channels < c) + eps)
    a = load(weight_ptr, channels, channels < c) * inv
    tl.store(dparams_ptr + channels, s2 * inv, mask=channels < c)
    tl.store(dparams_ptr + c + channels, s1, mask=channels < c)
    tl.store(coefficients_ptr + channels, a, mask=channels < c)
    tl.store(coefficients_ptr + c + channels, -a * inv * inv * s2 / m, mask=channels < c)
    tl.store(coefficients_ptr + 2 * c + channels, -a * s1 / m, mask=channels < c)


@triton.jit
def _coefficients_kernel(
    partials_ptr, weight_ptr, var_ptr, eps, r_weight_ptr, r_var_ptr, r_eps,
    dparams_ptr, coefficients_ptr,
    m, c, partials,
    HAS_NORM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    s1 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    r_s2 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    size = partials * c
    for first in range(0, partials, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        s1 += _partial_sum(partials_ptr, p, partials, channels, c)
        s2 += _partial_sum(partials_ptr + size, p, partials, channels, c)
        if HAS_NORM:
            r_s2 += _partial_sum(partials_ptr + 2 * size, p, partials, channels, c)
    _store_coefficients(
        s1, s2, weight_ptr, var_ptr, eps, dparams_ptr, coefficients_ptr, m, channels, c
    )
    if HAS_NORM:
        dparams_ptr += 2 * c
        coefficients_ptr += 3 * c
        _store_coefficients(
            s1, r_s2, r_weight_ptr, r_var_ptr, r_eps, dparams_ptr, coefficients_ptr, m, channels, c
        )


def sums(
    dy: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    act: str,
    residual: torch.Tensor | None = None,
    r_norm: Norm | None = None,
    mask: torch.Tensor | None = None,
    dy2: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Launch dz = (dy + dy2)*act'(z), added in float32 and rounded once, and its sums.

    dy, dy2, x, residual [N, C, H, W] of one dtype. z comes from the mask where there is one, else
        from x and the residual, with `r_norm` a raw one. A residual that is added to an identity
        is not needed to know the gradient: leave it out.
    Returns dz [N, C, H, W], channels-last, or None where nothing but the second pass would read
    it, which then computes it anew (no residual or one with a norm, and no dy2); and partials
    float32 [2, P, C], or [3, P, C] with `r_norm`.
    """
    keep = dy2 is not None or _is_added(residual, r_norm, mask)
    dz = empty_nhwc(*x.shape, like=x) if keep else None
    return dz, _launch_sums(dy, dy2, x, norm, act, residual, r_norm, mask, dz, None, None)


def frozen(
    dy: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    act: str,
    residual: torch.Tensor | None = None,
    r_norm: Norm | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Launch the gradients under constant statistics; arguments as in `sums`.

    Returns dx, the residual's gradient (None without one) and the partials of dweight and dbias.
    """
    dx = empty_nhwc(*x.shape, like=x)
    dz = empty_nhwc(*x.shape, like=x) if _is_added(residual, r_norm, mask) else None
    dr = None if r_norm is None else empty_nhwc(*x.shape, like=x)
    partials = _launch_sums(dy, None, x, norm, act, residual, r_norm, mask, dz, dx, dr)
    return dx, dz if r_norm is None else dr, partials


def _is_added(residual, r_norm, mask) -> bool:
    # then dz is the residual's gradient
    return mask is not None or kind_of(residual, r_norm) == "add"


def _launch_sums(dy, dy2, x, norm, act, residual, r_norm, mask, dz, dx, dr) -> torch.Tensor:
    x = nhwc(x)
    n, c, h, w = x.shape
    m = n * h * w
    tile = SUMS[x.element_size()]
    block_m, block_c = tile.blocks(c)
    programs = tile.reducing(m, c, x.device)
    statistics = 2 if r_norm is None else 3
    partials = torch.empty((statistics, programs, c), dtype=torch.float32, device=x.device)
    run(
        _sums_kernel,
        (programs * cdiv(c, block_c),),
        *(nhwc(dy), None if dy2 is None else nhwc(dy2), x, *norm),
        *(None if residual is None else nhwc(residual), *(r_norm or norm)),
        *(mask, dz, dx, dr, partials, m, c, programs),
        ACT=act,
        RESIDUAL=kind_of(residual, r_norm),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=tile.warps,
    )
    return partials


def coefficients(
    partials: torch.Tensor, m: int, norm: Norm, r_norm: Norm | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch what follows from the sums: partials float32 [2, P, C], or [3, P, C] with `r_norm`,
    of a batch of m values a channel.

    Returns float32 [2, C] dweight, dbias, and [3, C] A, B, C of dx; with `r_norm` [4, C] and
    [6, C], those of the residual below.
    """
    statistics, count, c = partials.shape
    if count > FOLD_ABOVE:
        folded = torch.empty((statistics, FOLDED, c), dtype=torch.float32, device=partials.device)
        grid = (FOLDED * cdiv(c, FOLD_CHANNELS), statistics)
        run(_fold_kernel, grid, partials, folded, c, count, FOLDED,
            BLOCK_P=FOLD_PARTIALS, BLOCK_C=FOLD_CHANNELS, num_warps=8)  # fmt: skip
        partials, count = folded, FOLDED
    norms = 1 if r_norm is None else 2
    dparams, found = (
        torch.empty((rows * norms, c), dtype=torch.float32, device=partials.device)
        for rows in (2, 3)
    )
    r = r_norm or norm
    run(
        _coefficients_kernel,
        (cdiv(c, MERGE_CHANNELS),),
        *(partials, norm.weight, norm.var, norm.eps, r.weight, r.var, r.eps, dparams, found),
        *(max(m, 1), c, count),
        HAS_NORM=r_norm is not None,
        BLOCK_P=min(next_power_of_2(count), MERGE_PARTIALS),
        BLOCK_C=MERGE_CHANNELS,
        num_warps=8,
    )
    return dparams, found

"""The kernels and launchers of bn_act; the equations, the traffic and the layout stand there.

A tensor is read as [M, C], M = N*H*W. `r` is the residual, `RESIDUAL` how it enters z: "none",
"add", or "norm" with a BatchNorm of its own. Launchers take norm = (weight, bias, mean, var), each
[C]; pointers that a variant does not use are handed x's own.
"""

import torch

from kernels.activation import activate, activate_grad
from kernels.bn_stats import Tile, tile_position
from kernels.launch import cdiv, empty_nhwc, next_power_of_2, nhwc, run, tl, triton
from kernels.numerics import rounded

# by bytes of an element
FORWARD = {2: Tile(4096, 4), 4: Tile(2048, 4)}
SUMS = {2: Tile(2048, 4, 8), 4: Tile(2048, 4, 8)}
APPLY = {2: Tile(2048, 4), 4: Tile(2048, 4)}
MERGE_PARTIALS, MERGE_CHANNELS = 512, 8

# weight, bias, mean, var
Channels = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def kind_of(residual: torch.Tensor | None, r_norm: object | None) -> str:
    """How the residual enters z: "none", "add" or "norm" (with a BatchNorm of its own)."""
    if residual is None:
        return "none"
    return "add" if r_norm is None else "norm"


def keeps_mask(act: str, kind: str) -> bool:
    """Whether the backward needs the mask of z > 0, since z cannot be recomputed from x alone."""
    return kind == "add" and act in ("relu", "leaky_relu")


@triton.jit
def _load(ptr, offsets, inside):
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, c, eps):
    inv = tl.rsqrt(_load(var_ptr, cols, cols < c) + eps)
    s = _load(weight_ptr, cols, cols < c) * inv
    return _load(mean_ptr, cols, cols < c), s, _load(bias_ptr, cols, cols < c)


@triton.jit
def _preactivation(x, mean, s, b, r, r_mean, r_s, r_b, RESIDUAL: tl.constexpr, DTYPE: tl.constexpr):
    # x - mean first: s*x + (b - mean*s) cancels where |mean| is far above the standard deviation
    z = (x - mean) * s + b
    if RESIDUAL == "add":
        z += r
    elif RESIDUAL == "norm":
        z += (r - r_mean) * r_s + r_b
    return rounded(z, DTYPE).to(tl.float32)


@triton.jit
def _mask_position(tile, rows, m, c, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    width = tl.cdiv(c, 8)
    column = (tl.program_id(0) % tl.cdiv(c, BLOCK_C)) * (BLOCK_C // 8)
    column += tl.arange(0, BLOCK_C // 8)[None, :]
    inside = (rows < m - tile * BLOCK_M) & (column < width)
    return tile.to(tl.int64) * BLOCK_M * width + rows * width + column, inside


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    r_ptr, r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr,
    y_ptr, mask_ptr,
    m, c, eps, r_eps,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, KEEP_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, rows, channels = tile_position(c, BLOCK_M, BLOCK_C)
    cols = channels[None, :]
    mean, s, b = _norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, c, eps)
    r_mean, r_s, r_b = _norm(r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, cols, c, r_eps)
    first = tile.to(tl.int64) * BLOCK_M * c
    offsets = rows * c + cols
    inside = (rows < m - tile * BLOCK_M) & (cols < c)
    x = _load(x_ptr + first, offsets, inside)
    r = _load(r_ptr + first, offsets, inside) if RESIDUAL != "none" else x
    z = _preactivation(x, mean, s, b, r, r_mean, r_s, r_b, RESIDUAL, y_ptr.dtype.element_ty)
    y = rounded(activate(z, ACT), y_ptr.dtype.element_ty)
    tl.store(y_ptr + first + offsets, y, mask=inside)
    if KEEP_MASK:
        # eight neighbouring channels, the 16 bytes of bf16 that one thread holds, make a byte
        bits = tl.reshape((z > 0).to(tl.int32), (BLOCK_M, BLOCK_C // 8, 8))
        bits = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
        at, kept = _mask_position(tile, rows, m, c, BLOCK_M, BLOCK_C)
        tl.store(mask_ptr + at, bits.to(tl.uint8), mask=kept)


@triton.jit
def _sums_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    r_ptr, r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr,
    mask_ptr, dx_ptr, dr_ptr, partials_ptr,
    m, c, programs, eps, r_eps,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, HAS_MASK: tl.constexpr,
    WRITE_DX: tl.constexpr, WRITE_DR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, rows, channels = tile_position(c, BLOCK_M, BLOCK_C)
    cols = channels[None, :]
    mean, s, b = _norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, c, eps)
    r_mean, r_s, r_b = _norm(r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, cols, c, r_eps)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    offsets = rows * c + cols
    s1 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    r_s2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for k in range(tl.cdiv(tl.cdiv(m, BLOCK_M) - program, programs)):
        tile = program + k * programs
        first = tile.to(tl.int64) * BLOCK_M * c
        inside = (rows < m - tile * BLOCK_M) & (cols < c)
        dy = _load(dy_ptr + first, offsets, inside)
        x = _load(x_ptr + first, offsets, inside)
        if HAS_MASK:
            at, kept = _mask_position(tile, rows, m, c, BLOCK_M, BLOCK_C)
            bits = tl.load(mask_ptr + at, mask=kept, other=0).to(tl.int32)[:, :, None]
            bits = (bits >> tl.arange(0, 8)[None, None, :]) & 1
            z = tl.where(tl.reshape(bits, (BLOCK_M, BLOCK_C)) == 1, 1.0, -1.0)
            dz = dy * activate_grad(z, ACT)
        else:
            r = _load(r_ptr + first, offsets, inside) if RESIDUAL != "none" else x
            z = _preactivation(x, mean, s, b, r, r_mean, r_s, r_b, RESIDUAL, DTYPE)
            dz = dy * activate_grad(z, ACT)
            if RESIDUAL == "norm":
                r_s2 += dz * (r - r_mean)
                if WRITE_DR:
                    tl.store(dr_ptr + first + offsets, rounded(dz * r_s, DTYPE), mask=inside)
        if RESIDUAL == "add" and WRITE_DR:
            # the sums and the second pass use the same, rounded dz
            stored = rounded(dz, DTYPE)
            tl.store(dr_ptr + first + offsets, stored, mask=inside)
            dz = stored.to(tl.float32)
        s1 += dz
        s2 += dz * (x - mean)
        if WRITE_DX:
            tl.store(dx_ptr + first + offsets, rounded(dz * s, DTYPE), mask=inside)
    at = partials_ptr + program * c + channels
    tl.store(at, tl.sum(s1, axis=0), mask=channels < c)
    tl.store(at + programs * c, tl.sum(s2, axis=0), mask=channels < c)
    if RESIDUAL == "norm":
        tl.store(at + 2 * programs * c, tl.sum(r_s2, axis=0), mask=channels < c)


@triton.jit
def _store_parameters(dparams_ptr, s1, s2, inv, c, channels):
    tl.store(dparams_ptr + channels, s2 * inv, mask=channels < c)
    tl.store(dparams_ptr + c + channels, s1, mask=channels < c)


@triton.jit
def _store_coefficients(ptr, s1, s2, inv, weight_ptr, m, c, channels):
    a = tl.load(weight_ptr + channels, mask=channels < c, other=0.0).to(tl.float32) * inv
    tl.store(ptr + channels, a, mask=channels < c)
    tl.store(ptr + c + channels, -a * inv * inv * s2 / m, mask=channels < c)
    tl.store(ptr + 2 * c + channels, -a * s1 / m, mask=channels < c)


@triton.jit
def _coefficients_kernel(
    partials_ptr, weight_ptr, var_ptr, r_weight_ptr, r_var_ptr, dparams_ptr, coefficients_ptr,
    m, c, partials, eps, r_eps,
    HAS_NORM: tl.constexpr, FROZEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < c
    s1 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    r_s2 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(0, partials, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)[:, None]
        at = p * c + channels[None, :]
        there = (p < partials) & inside[None, :]
        s1 += tl.sum(_load(partials_ptr, at, there), axis=0)
        s2 += tl.sum(_load(partials_ptr + partials * c, at, there), axis=0)
        if HAS_NORM:
            r_s2 += tl.sum(_load(partials_ptr + 2 * partials * c, at, there), axis=0)
    inv = tl.rsqrt(_load(var_ptr, channels, inside) + eps)
    _store_parameters(dparams_ptr, s1, s2, inv, c, channels)
    if not FROZEN:
        _store_coefficients(coefficients_ptr, s1, s2, inv, weight_ptr, m, c, channels)
    if HAS_NORM:
        r_inv = tl.rsqrt(_load(r_var_ptr, channels, inside) + r_eps)
        _store_parameters(dparams_ptr + 2 * c, s1, r_s2, r_inv, c, channels)
        if not FROZEN:
            r_ptr = coefficients_ptr + 3 * c
            _store_coefficients(r_ptr, s1, r_s2, r_inv, r_weight_ptr, m, c, channels)


@triton.jit
def _store_gradient(ptr, coefficients_ptr, dz, centred, offsets, inside, cols, c):
    a = _load(coefficients_ptr, cols, cols < c)
    b = _load(coefficients_ptr + c, cols, cols < c)
    constant = _load(coefficients_ptr + 2 * c, cols, cols < c)
    dx = rounded(a * dz + b * centred + constant, ptr.dtype.element_ty)
    tl.store(ptr + offsets, dx, mask=inside)


@triton.jit
def _apply_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    r_ptr, r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr,
    coefficients_ptr, dx_ptr, dr_ptr,
    m, c, eps, r_eps,
    ACT: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, rows, channels = tile_position(c, BLOCK_M, BLOCK_C)
    tile = tl.cdiv(m, BLOCK_M) - 1 - tile  # from the end: what the sums read last is in the L2
    cols = channels[None, :]
    mean, s, b = _norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, c, eps)
    r_mean, r_s, r_b = _norm(r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, cols, c, r_eps)
    first = tile.to(tl.int64) * BLOCK_M * c
    offsets = rows * c + cols
    inside = (rows < m - tile * BLOCK_M) & (cols < c)
    dy = _load(dy_ptr + first, offsets, inside)
    x = _load(x_ptr + first, offsets, inside)
    r = _load(r_ptr + first, offsets, inside) if HAS_NORM else x
    RESIDUAL: tl.constexpr = "norm" if HAS_NORM else "none"
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    z = _preactivation(x, mean, s, b, r, r_mean, r_s, r_b, RESIDUAL, DTYPE)
    dz = dy * activate_grad(z, ACT)
    _store_gradient(dx_ptr + first, coefficients_ptr, dz, x - mean, offsets, inside, cols, c)
    if HAS_NORM:
        r_coefficients = coefficients_ptr + 3 * c
        _store_gradient(dr_ptr + first, r_coefficients, dz, r - r_mean, offsets, inside, cols, c)


def empty_outputs(x: torch.Tensor, kind: str, act: str) -> tuple[torch.Tensor, torch.Tensor]:
    n, c, h, w = x.shape
    size = (n * h * w, -(-c // 8)) if keeps_mask(act, kind) else (0,)
    return empty_nhwc(n, c, h, w, like=x), x.new_empty(size, dtype=torch.uint8)


def empty_gradients(x: torch.Tensor, kind: str, act: str) -> tuple[torch.Tensor, torch.Tensor]:
    # an identity's residual has the gradient dy, which is at hand
    own = kind == "norm" or (kind == "add" and act != "identity")
    dx = empty_nhwc(*x.shape, like=x)
    return dx, empty_nhwc(*x.shape, like=x) if own else x.new_empty(0)


def forward(
    x: torch.Tensor,
    norm: Channels,
    residual: torch.Tensor | None,
    r_norm: Channels | None,
    act: str,
    eps: float,
    r_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch y = act(...) with norm = (weight, bias, mean, var), each [C]; returns y [N, C, H, W],
    channels-last, and the mask uint8 [N*H*W, ceil(C/8)] (empty if the backward needs none)."""
    x = nhwc(x)
    n, c, h, w = x.shape
    m, kind = n * h * w, kind_of(residual, r_norm)
    y, mask = empty_outputs(x, kind, act)
    if m:
        tile = FORWARD[x.element_size()]
        block_m, block_c = tile.blocks(c)
        run(
            _forward_kernel,
            (cdiv(m, block_m) * cdiv(c, block_c),),
            *(x, *norm),
            *(x if residual is None else nhwc(residual), *(r_norm or norm)),
            *(y, mask, m, c, eps, r_eps),
            ACT=act,
            RESIDUAL=kind,
            KEEP_MASK=keeps_mask(act, kind),
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=tile.warps,
        )
    return y, mask


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    norm: Channels,
    residual: torch.Tensor | None,
    r_norm: Channels | None,
    mask: torch.Tensor,
    kind: str,
    act: str,
    training: bool,
    eps: float,
    r_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the gradients, `kind` being none, add or norm and `residual` what was saved of it.

    Returns dx and dresidual [N, C, H, W], channels-last (dresidual is empty where it is dy), and
    float32 [2, C] dweight, dbias, or [4, C] with those of the residual's norm below.
    """
    dy, x = nhwc(dy), nhwc(x)
    n, c, h, w = x.shape
    m, itemsize = n * h * w, x.element_size()
    has_norm = kind == "norm"
    write_dz = kind == "add" and act != "identity"
    dx, dr = empty_gradients(x, kind, act)
    rows = 4 if has_norm else 2
    if m == 0:
        return dx, dr, torch.zeros((rows, c), dtype=torch.float32, device=x.device)

    tile = SUMS[itemsize]
    block_m, block_c = tile.blocks(c)
    programs = tile.reducing(m, c, x.device)
    r = x if residual is None else nhwc(residual)
    branches = (x, *norm, r, *(r_norm or norm))
    partials, dparams, coefficients = (
        torch.empty(size, dtype=torch.float32, device=x.device)
        for size in ((1 + rows // 2, programs, c), (rows, c), (3 * rows // 2, c))
    )
    run(
        _sums_kernel,
        (programs * cdiv(c, block_c),),
        *(dy, *branches, mask, dx, dr, partials, m, c, programs, eps, r_eps),
        ACT=act,
        # an identity's sum is not needed to know its gradient
        RESIDUAL="none" if kind == "add" and act == "identity" else kind,
        HAS_MASK=keeps_mask(act, kind),
        WRITE_DX=not training,
        WRITE_DR=write_dz or (has_norm and not training),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=tile.warps,
    )
    _, weight, _, _, var, _, r_weight, _, _, r_var = branches
    run(
        _coefficients_kernel,
        (cdiv(c, MERGE_CHANNELS),),
        *(partials, weight, var, r_weight, r_var, dparams, coefficients),
        *(m, c, programs, eps, r_eps),
        HAS_NORM=has_norm,
        FROZEN=not training,
        BLOCK_P=min(next_power_of_2(programs), MERGE_PARTIALS),
        BLOCK_C=MERGE_CHANNELS,
        num_warps=8,
    )
    if training:
        tile = APPLY[itemsize]
        block_m, block_c = tile.blocks(c)
        run(
            _apply_kernel,
            (cdiv(m, block_m) * cdiv(c, block_c),),
            *(dr if write_dz else dy, *branches, coefficients, dx, dr, m, c, eps, r_eps),
            ACT="identity" if write_dz else act,  # what the first pass wrote is dz
            HAS_NORM=has_norm,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=tile.warps,
        )
    return dx, dr, dparams

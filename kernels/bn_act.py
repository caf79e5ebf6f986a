"""bn_act: BatchNorm, a residual and the activation in one pass each way.

    forward    z = (x - mean)*s + bias  [+ residual | + (r - r_mean)*r_s + r_bias]
               y = act(z),  s = weight / sqrt(var + eps)
    backward   dz = dy*act'(z);  S1 = sum dz;  S2 = sum dz*(x - mean);  m = N*H*W
               dbias = S1;  dweight = S2 / sqrt(var + eps);  dresidual = dz
               dx = A*dz + B*(x - mean) + C
               A = s;  B = -s*S2 / (m*(var + eps));  C = -s*S1 / m        (Ioffe, Szegedy 2015)
               running statistics are constants: dx = s*dz
               r, the raw output of a downsample convolution, has the same dz and S1, its own S2

Traffic, in tensors of N*H*W*C elements (read + written; a mask of 1 bit an element is 1/16 in
bf16), beside the statistics pass (1, unless the convolution delivers them):

                  forward         backward in training             running statistics
    no residual   1 + 1           (2 + 0) + (2 + 1) = 5            2 + 1 = 3
    residual      2 + 1 + 1/16    (2 + 1/16 + 1) + (2 + 1) = 6.06  2 + 1/16 + 2 = 4.06
    residual_norm 2 + 1           (3 + 0) + (3 + 2) = 8            3 + 2 = 5

With a residual the first backward pass writes dz, which is the residual's gradient anyway and
all that the second needs; otherwise the second computes dz anew, which costs no write. The
second pass goes through the rows from the end, where the first has left them in the L2 cache.

Saved for backward: x, [C] vectors, and r, or for a residual the mask of z > 0 (relu, leaky_relu)
or the residual itself (smooth activations). z is rounded to the storage type before the
activation, as in eager PyTorch, and recomputed by the same expression.

Layout: x, residual, r [N, C, H, W] of one shape and dtype, any strides; copied once unless
channels-last. Sums are float32 in a fixed order. Where Triton cannot run the op is `reference`.
"""

import torch
import torch.nn.functional as F

from kernels.activation import ACTS, REFERENCE, activate, activate_grad
from kernels.bn_stats import Tile, batch_statistics, statistics, tile_position
from kernels.bn_stats import reference as reference_statistics
from kernels.launch import check, empty_nhwc, nhwc, run, runs_triton, tl, triton
from kernels.numerics import rounded
from kernels.shapes import STAGES
from kernels.spec import Cost, Inputs, KernelSpec, Shape

# by bytes of an element
FORWARD = {2: Tile(4096, 4), 4: Tile(2048, 4)}
SUMS = {2: Tile(2048, 4, 8), 4: Tile(2048, 4, 8)}
APPLY = {2: Tile(4096, 4), 4: Tile(2048, 4)}
MERGE_PARTIALS, MERGE_CHANNELS = 512, 8

Norm = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, float]
Stats = tuple[torch.Tensor, torch.Tensor]


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *,
    residual: torch.Tensor | None = None,
    residual_norm: Norm | None = None,
    act: str = "relu",
    training: bool = True,
    eps: float = 1e-5,
    stats: Stats | None = None,
    residual_stats: Stats | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """`bn_act` in plain PyTorch, any float dtype; statistics are taken from x and the residual,
    delivered ones are only handed through."""

    def norm(t, weight, bias, running_mean, running_var, eps):
        running = (None, None) if training else (running_mean, running_var)
        return F.batch_norm(t, *running, weight, bias, training, 0.0, eps)

    def batch_stats(t, delivered):
        return (delivered or reference_statistics(t.detach())) if training else (None, None)

    z = norm(x, weight, bias, running_mean, running_var, eps)
    found = batch_stats(x, stats)
    if residual_norm is not None:
        z = z + norm(residual, *residual_norm)
        found += batch_stats(residual, residual_stats)
    elif residual is not None:
        z = z + residual
    return REFERENCE[act](z), *found


def keeps_mask(act: str, residual: torch.Tensor | None, has_norm: bool) -> bool:
    """Whether the backward needs the mask of z > 0: z cannot be recomputed from x alone."""
    return residual is not None and not has_norm and act in ("relu", "leaky_relu")


@triton.jit
def _load(ptr, offsets, inside):
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _channels(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, c, eps):
    inv = tl.rsqrt(_load(var_ptr, cols, cols < c) + eps)
    scale = _load(weight_ptr, cols, cols < c) * inv
    return _load(mean_ptr, cols, cols < c), scale, _load(bias_ptr, cols, cols < c)


@triton.jit
def _preactivation(
    x, mean, s, b, r, r_mean, r_s, r_b, RESIDUAL: tl.constexpr, DTYPE: tl.constexpr
):
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
    tile, rows, cols = tile_position(c, BLOCK_M, BLOCK_C)
    mean, s, b = _channels(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, c, eps)
    r_mean, r_s, r_b = _channels(
        r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, cols, c, r_eps
    )
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
    program, rows, cols = tile_position(c, BLOCK_M, BLOCK_C)
    mean, s, b = _channels(weight_ptr, bias_ptr, mean_ptr, var_ptr, cols, c, eps)
    r_mean, r_s, r_b = _channels(
        r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, cols, c, r_eps
    )
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
        if RESIDUAL == "add":
            if WRITE_DR:
                # the sums and the second pass use the same, rounded dz
                stored = rounded(dz, DTYPE)
                tl.store(dr_ptr + first + offsets, stored, mask=inside)
                dz = stored.to(tl.float32)
        s1 += dz
        s2 += dz * (x - mean)
        if WRITE_DX:
            tl.store(dx_ptr + first + offsets, rounded(dz * s, DTYPE), mask=inside)
    cols = tl.sum(tl.where(rows == 0, cols, 0), axis=0)
    at = partials_ptr + program * c + cols
    tl.store(at, tl.sum(s1, axis=0), mask=cols < c)
    tl.store(at + programs * c, tl.sum(s2, axis=0), mask=cols < c)
    if RESIDUAL == "norm":
        tl.store(at + 2 * programs * c, tl.sum(r_s2, axis=0), mask=cols < c)

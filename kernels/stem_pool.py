"""bn_act_pool: BatchNorm, activation and the stem's 3x3, stride 2, padding 1 max-pool in one pass.

    forward    z = (x - mean)*s + bias, s = weight*inv, inv = rsqrt(var + eps)
               y[p, q] = max of act(z) over the 3x3 window centred on x[2p, 2q]
    backward   dz = act'(z) * (sum of dy over the windows whose maximum x is)
               S1 = sum dz, S2 = sum dz*(x - mean); dbias = S1, dweight = inv*S2
               dx = A*dz + B*(x - mean) + C in training, s*dz with frozen statistics
               A = s, B = -s*inv^2*S2/m, C = -s*S1/m, m = N*H*W

dz is zero outside the arg-max, so S1 and S2 are sums over windows, of dy and of the x that won.
That x is written by the forward (`x_max`, beside a one-byte position 0..8): gathering it later
would touch nearly every sector of x. dx is written once, without atomics: the pixels 2p..2p+1,
2q..2q+1 receive from the windows p..p+1, q..q+1 alone, and 9 comparisons say which point at which.

Traffic, in tensors of N*H*W*C elements of 2 bytes (eager channels-last in brackets): forward reads
1, writes 0.25 + 0.25 + 0.125 (eager 3 and 3, its index is int64); backward reads 0.5, then
1 + 0.25 + 0.125, and writes 1 (eager about 8.5). Frozen statistics read x_max in place of x. The
batch statistics, where the convolution has not delivered them, read x once more.

Layout: x [N, C, H, W] channels-last (copied once if not), y [N, C, (H+1)//2, (W+1)//2]. Rounding is
eager's: z and then act(z) are rounded to the storage type before they are compared. The
first maximum in row-major order wins, a NaN always does (relu: the first maximum of z, which is
the same one wherever the gradient is not zero). Where Triton cannot run: `reference`.
"""

import torch
import torch.nn.functional as F

from kernels.activation import ACTS, REFERENCE, REFERENCE_BACKWARD, activate, activate_grad
from kernels.bn_stats import Tile, batch_statistics
from kernels.launch import cdiv, check, empty_nhwc, nhwc, run, runs_triton, tl, triton
from kernels.numerics import rounded
from kernels.shapes import STEM
from kernels.spec import Cost, Inputs, KernelSpec, Shape

Stats = tuple[torch.Tensor, torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


FORWARD_TILE = Tile(1024, 4)
FORWARD_ROWS = 4  # rows of windows a program walks down, each sharing a row of x with the next
SUMS_TILE = Tile(2048, 4, 4)
BACKWARD_TILE = Tile(512, 4)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    act: str = "relu",
    training: bool = True,
    eps: float = 1e-5,
    stats: Stats | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`bn_act_pool` in plain PyTorch; `stats` are x's own by contract, so it computes them."""
    if training:
        running_mean = running_var = None
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.0, eps)
    y = F.max_pool2d(REFERENCE[act](z), 3, 2, 1)
    if not training:
        return y, None, None
    var, mean = torch.var_mean(x.detach().to(weight.dtype), (0, 2, 3), correction=0)
    return y, mean, var


@triton.jit
def _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, inside, eps):
    """mean, s and bias [1, BLOCK_C] of (x - mean)*s + bias."""
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=inside, other=1.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return mean[None, :], (weight * tl.rsqrt(var + eps))[None, :], bias[None, :]


@triton.jit
def _preactivation(x, mean, s, bias, DTYPE: tl.constexpr):
    """BatchNorm of x, rounded as eager's; an explicit fma, so that every pass sees the same bits
    (and x - mean first: s*x + (bias - mean*s) cancels)."""
    return rounded(tl.fma(x - mean, s, bias), DTYPE).to(tl.float32)


@triton.jit
def _row_maximum(x_ptr, row, column, inside, mean, s, b, W, C, ACT: tl.constexpr):
    """First maximum of act(z) over columns column..column+2 of a row of x: value, x, place.

    row [BLOCK_M] offset of the row, column [BLOCK_M] >= -1, inside [BLOCK_M, BLOCK_C].
    """
    dtype = x_ptr.dtype.element_ty
    for j in tl.static_range(3):
        w = column + j
        ok = inside & ((w >= 0) & (w < W))[:, None]
        x = tl.load(x_ptr + (row + w * C)[:, None], mask=ok, other=0.0).to(tl.float32)
        z = _preactivation(x, mean, s, b, dtype)
        if ACT != "relu":  # relu's is taken of the winner: it keeps order and rounding
            z = rounded(activate(z, ACT), dtype).to(tl.float32)
        if j == 0:
            best, x_best, place = z, x, tl.zeros(x.shape, tl.int32)
        else:
            # column -1 does not exist: there column 0 is the first and wins whatever it is
            wins = ok & ((z > best) | (z != z) | (w == 0)[:, None])
            best = tl.where(wins, z, best)
            x_best = tl.where(wins, x, x_best)
            place = tl.where(wins, j, place)
    return best, x_best, place


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, y_ptr, x_max_ptr, index_ptr,
    N, H, W, C, P, Q, eps,
    ACT: tl.constexpr, SAVE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(P, ROWS)
    first = tl.program_id(0) % row_blocks * ROWS  # neighbours in time share a row of x
    m = tl.program_id(0) // row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # (n, q)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (m // Q).to(tl.int64)
    q = m % Q
    inside = (m < N * Q)[:, None] & (c < C)[None, :]
    mean, s, b = _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, c < C, eps)
    x_ptr += c[None, :]
    column = 2 * q - 1

    row = (n * H + 2 * first - 1) * W * C
    ok = inside & (first > 0)
    top, x_top, j_top = _row_maximum(x_ptr, row, column, ok, mean, s, b, W, C, ACT)
    for k in tl.static_range(ROWS):
        p = first + k
        row = (n * H + 2 * p) * W * C
        ok = inside & (p < P)
        mid, x_mid, j_mid = _row_maximum(x_ptr, row, column, ok, mean, s, b, W, C, ACT)
        below = ok & (2 * p + 1 < H)
        end, x_end, j_end = _row_maximum(x_ptr, row + W * C, column, below, mean, s, b, W, C, ACT)

        wins = (mid > top) | (mid != mid) | (p == 0)  # there is no row -1
        best = tl.where(wins, mid, top)
        x_best = tl.where(wins, x_mid, x_top)
        place = tl.where(wins, 3 + j_mid, j_top)
        wins = below & ((end > best) | (end != end))
        best = tl.where(wins, end, best)
        x_best = tl.where(wins, x_end, x_best)
        place = tl.where(wins, 6 + j_end, place)

        out = (((n * P + p) * Q + q) * C)[:, None] + c[None, :]
        y = activate(best, "relu") if ACT == "relu" else best
        tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=ok)  # exact: rounded before
        if SAVE:
            tl.store(x_max_ptr + out, x_best.to(x_max_ptr.dtype.element_ty), mask=ok)
            tl.store(index_ptr + out, place.to(tl.uint8), mask=ok)
        top, x_top, j_top = end, x_end, j_end


@triton.jit
def _window_gradient(
    dy_ptr, x_max_ptr, offsets, inside, mean, s, b, ACT: tl.constexpr, MASKED: tl.constexpr
):
    """dy of the windows at `offsets` [BLOCK_M, BLOCK_C], times act' at their maximum if MASKED."""
    g = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        x = tl.load(x_max_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        z = _preactivation(x, mean, s, b, x_max_ptr.dtype.element_ty)
        g *= activate_grad(z, ACT)
    return g


@triton.jit
def _sums_kernel(
    dy_ptr, x_max_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, partial_ptr,
    M, C, eps, rows_per_program,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial [programs, 2, C]: the sums of dz and of dz*(x - mean) over a slice of the windows."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, s, b = _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, c < C, eps)
    start = tl.program_id(0) * rows_per_program
    end = tl.minimum(start + rows_per_program, M)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(start, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        inside = (m < end)[:, None] & (c < C)[None, :]
        offsets = m.to(tl.int64)[:, None] * C + c[None, :]
        dz = _window_gradient(dy_ptr, x_max_ptr, offsets, inside, mean, s, b, ACT, True)
        x = tl.load(x_max_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        sum_dz += dz
        sum_dz_x += tl.where(inside, dz * (x - mean), 0.0)
    partial_ptr += tl.program_id(0) * 2 * C + c
    tl.store(partial_ptr, tl.sum(sum_dz, 0), mask=c < C)
    tl.store(partial_ptr + C, tl.sum(sum_dz_x, 0), mask=c < C)


@triton.jit
def _merge_kernel(
    partial_ptr, weight_ptr, var_ptr, coefficients_ptr, dweight_ptr, dbias_ptr,
    programs, C, eps, pixels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """coefficients [3, C] = A, B, C of dx; dweight and dbias [C]."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_dz = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        inside = (program < programs)[:, None] & (c < C)[None, :]
        offsets = program[:, None] * 2 * C + c[None, :]
        sum_dz += tl.load(partial_ptr + offsets, mask=inside, other=0.0)
        sum_dz_x += tl.load(partial_ptr + C + offsets, mask=inside, other=0.0)
    s1 = tl.sum(sum_dz, 0)
    s2 = tl.sum(sum_dz_x, 0)
    inv = tl.rsqrt(tl.load(var_ptr + c, mask=c < C, other=1.0).to(tl.float32) + eps)
    s = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32) * inv
    tl.store(coefficients_ptr + c, s, mask=c < C)
    tl.store(coefficients_ptr + C + c, -s * inv * inv * s2 / pixels, mask=c < C)
    tl.store(coefficients_ptr + 2 * C + c, -s * s1 / pixels, mask=c < C)
    tl.store(dweight_ptr + c, rounded(inv * s2, dweight_ptr.dtype.element_ty), mask=c < C)
    tl.store(dbias_ptr + c, rounded(s1, dbias_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _store_dx(
    dx_ptr, x_ptr, offsets, inside, g, mean, s, b, slope, offset,
    ACT: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """dx of one pixel of each 2x2 square from g, the sum of its windows' gradients."""
    if TRAINING:
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        z = _preactivation(x, mean, s, b, x_ptr.dtype.element_ty)
        g *= activate_grad(z, ACT)
        dx = s * g + (slope * (x - mean) + offset)
    else:
        dx = s * g
    tl.store(dx_ptr + offsets, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, x_max_ptr, index_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    coefficients_ptr, dx_ptr, M, H, W, C, P, Q, eps,
    ACT: tl.constexpr, TRAINING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # (n, p, q)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    q = m % Q
    p = m // Q % P
    n = (m // (P * Q)).to(tl.int64)
    mean, s, b = _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, c < C, eps)
    slope = tl.load(coefficients_ptr + C + c, mask=c < C, other=0.0)[None, :]
    offset = tl.load(coefficients_ptr + 2 * C + c, mask=c < C, other=0.0)[None, :]

    here = (m < M)[:, None] & (c < C)[None, :]
    right = here & (q + 1 < Q)[:, None]
    below = here & (p + 1 < P)[:, None]
    both = right & below
    window = m.to(tl.int64)[:, None] * C + c[None, :]
    masked: tl.constexpr = not TRAINING  # in training x is read anyway and act' is taken there
    g00 = _window_gradient(dy_ptr, x_max_ptr, window, here, mean, s, b, ACT, masked)
    g01 = _window_gradient(dy_ptr, x_max_ptr, window + C, right, mean, s, b, ACT, masked)
    g10 = _window_gradient(dy_ptr, x_max_ptr, window + Q * C, below, mean, s, b, ACT, masked)
    g11 = _window_gradient(dy_ptr, x_max_ptr, window + Q * C + C, both, mean, s, b, ACT, masked)
    i00 = tl.load(index_ptr + window, mask=here, other=0)
    i01 = tl.load(index_ptr + window + C, mask=right, other=0)
    i10 = tl.load(index_ptr + window + Q * C, mask=below, other=0)
    i11 = tl.load(index_ptr + window + Q * C + C, mask=both, other=0)

    pixel = (((n * H + 2 * p) * W + 2 * q) * C)[:, None] + c[None, :]
    right = here & (2 * q + 1 < W)[:, None]
    below = here & (2 * p + 1 < H)[:, None]
    g = tl.where(i00 == 4, g00, 0.0)
    _store_dx(dx_ptr, x_ptr, pixel, here, g, mean, s, b, slope, offset, ACT, TRAINING)
    g = tl.where(i00 == 5, g00, 0.0) + tl.where(i01 == 3, g01, 0.0)
    _store_dx(dx_ptr, x_ptr, pixel + C, right, g, mean, s, b, slope, offset, ACT, TRAINING)
    pixel += W * C
    g = tl.where(i00 == 7, g00, 0.0) + tl.where(i10 == 1, g10, 0.0)
    _store_dx(dx_ptr, x_ptr, pixel, below, g, mean, s, b, slope, offset, ACT, TRAINING)
    g = tl.where(i00 == 8, g00, 0.0) + tl.where(i01 == 6, g01, 0.0)
    g += tl.where(i10 == 2, g10, 0.0) + tl.where(i11 == 0, g11, 0.0)
    _store_dx(dx_ptr, x_ptr, pixel + C, right & below, g, mean, s, b, slope, offset, ACT, TRAINING)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    act: str,
    eps: float,
    save: bool,
    tile: Tile = FORWARD_TILE,
    rows: int = FORWARD_ROWS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward pass; returns y, x_max [N, C, P, Q] and index (uint8); the last two are
    empty unless `save`."""
    x = nhwc(x)
    n, c, h, w = x.shape
    p, q = (h + 1) // 2, (w + 1) // 2
    y, x_max, index = _outputs(x, save)
    if y.numel():
        block_m, block_c = tile.blocks(c)
        grid = (cdiv(n * q, block_m) * cdiv(p, rows), cdiv(c, block_c))
        run(
            _forward_kernel, grid, x, weight, bias, mean, var, y, x_max, index,
            n, h, w, c, p, q, eps,
            ACT=act, SAVE=save, ROWS=rows, BLOCK_M=block_m, BLOCK_C=block_c,
            num_warps=tile.warps,
        )  # fmt: skip
    return y, x_max, index


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    x_max: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    act: str,
    training: bool,
    eps: float,
    tile: Tile = BACKWARD_TILE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the sums over windows, their merge and the pass over x; returns dx, dweight, dbias."""
    dy, x = nhwc(dy), nhwc(x)
    n, c, h, w = x.shape
    p, q = dy.shape[2:]
    rows = n * p * q
    dx = empty_nhwc(n, c, h, w, like=x)
    if not rows:
        return dx, torch.zeros_like(weight), torch.zeros_like(bias)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    affine = (weight, bias, mean, var)

    block_m, block_c = SUMS_TILE.blocks(c)
    programs = SUMS_TILE.reducing(rows, c, x.device)
    per_program = cdiv(cdiv(rows, block_m), programs) * block_m
    programs = cdiv(rows, per_program)
    partial = torch.empty(programs, 2, c, dtype=torch.float32, device=x.device)
    coefficients = torch.empty(3, c, dtype=torch.float32, device=x.device)
    run(
        _sums_kernel, (programs, cdiv(c, block_c)), dy, x_max, *affine, partial,
        rows, c, eps, per_program,
        ACT=act, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=SUMS_TILE.warps,
    )  # fmt: skip
    run(
        _merge_kernel, (cdiv(c, 8),), partial, weight, var, coefficients, dweight, dbias,
        programs, c, eps, float(n * h * w), BLOCK_P=128, BLOCK_C=8,
    )  # fmt: skip
    block_m, block_c = tile.blocks(c)
    run(
        _backward_kernel, (cdiv(rows, block_m), cdiv(c, block_c)),
        dy, x, x_max, index, *affine, coefficients, dx, rows, h, w, c, p, q, eps,
        ACT=act, TRAINING=training, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=tile.warps,
    )  # fmt: skip
    return dx, dweight, dbias


def _outputs(x: torch.Tensor, save: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, c, h, w = x.shape
    pooled = (n, c, (h + 1) // 2, (w + 1) // 2)
    saved = pooled if save else (0, c, 1, 1)
    y = empty_nhwc(*pooled, like=x)
    return y, empty_nhwc(*saved, like=x), empty_nhwc(*saved, like=x, dtype=torch.uint8)


@torch.library.custom_op("lapis::bn_act_pool", mutates_args=())
def _op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    act: str,
    training: bool,
    eps: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if runs_triton(x):
        return forward(x, weight, bias, mean, var, act, eps, save)
    z = REFERENCE[act](F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps))
    y, flat = F.max_pool2d(z, 3, 2, 1, return_indices=True)
    outputs = _outputs(x, save)
    outputs[0].copy_(y)
    if save:
        p, q = (torch.arange(size, device=x.device) for size in y.shape[2:])
        row, column = flat // x.shape[3] - 2 * p[:, None] + 1, flat % x.shape[3] - 2 * q + 1
        outputs[1].copy_(x.flatten(2).gather(2, flat.flatten(2)).view(y.shape))
        outputs[2].copy_(3 * row + column)
    return outputs


@_op.register_fake
def _(x, weight, bias, mean, var, act, training, eps, save):
    return _outputs(x, save)


@torch.library.custom_op("lapis::bn_act_pool_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    x_max: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    act: str,
    training: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if runs_triton(dy):
        return backward(dy, x, x_max, index, weight, bias, mean, var, act, training, eps)
    # autograd is out of reach inside an op
    z = F.batch_norm(x_max, mean, var, weight, bias, False, 0.0, eps)
    dz = REFERENCE_BACKWARD[act](dy, z).float()
    flat = _pixels(index, x.shape[3])
    dz = dz.new_zeros(x.shape).flatten(2).scatter_add(2, flat.flatten(2), dz.flatten(2))
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        nhwc(dz.view(x.shape).to(x.dtype)), nhwc(x), weight, mean, var,
        mean, torch.rsqrt(var + eps), training, eps, [True] * 3,
    )  # fmt: skip
    return nhwc(dx), dweight.to(weight.dtype), dbias.to(bias.dtype)


def _pixels(index: torch.Tensor, width: int) -> torch.Tensor:
    """max_pool2d's flat int64 indices from positions [N, C, P, Q] in the windows."""
    p, q = (torch.arange(size, device=index.device) for size in index.shape[2:])
    return (2 * p[:, None] - 1 + index // 3) * width + 2 * q - 1 + index % 3


@_backward_op.register_fake
def _(dy, x, x_max, index, weight, bias, mean, var, act, training, eps):
    return empty_nhwc(*x.shape, like=x), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, mean, var, *ctx.options, _ = inputs
    _, x_max, index = output
    ctx.mark_non_differentiable(x_max, index)
    ctx.save_for_backward(x, x_max, index, weight, bias, mean, var)


def _differentiate(ctx, dy, _dx_max, _dindex):
    return *_backward_op(dy, *ctx.saved_tensors, *ctx.options), *(None,) * 6


_op.register_autograd(_differentiate, setup_context=_save)


def bn_act_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *,
    act: str = "relu",
    training: bool = True,
    eps: float = 1e-5,
    stats: Stats | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """max_pool2d(act(batch_norm(x)), 3, stride 2, padding 1) for x [N, C, H, W].

    weight, bias, running_mean, running_var: [C]; the running statistics are used, and must be
    there, when not `training`, and are never changed. stats: float32 mean and biased variance [C]
    of x over N, H, W where the convolution has delivered them; computed if None.
    Returns y [N, C, (H+1)//2, (W+1)//2] channels-last in x's dtype and, in training, the batch's
    mean and biased variance (float32 [C], no gradient), else None and None.

    Raises ValueError when a shape, dtype or device does not fit or `act` is unknown.
    """
    check(act in ACTS, lambda: f"act must be one of {', '.join(ACTS)}, not {act!r}")
    check(x.dim() == 4, lambda: f"x must be [N, C, H, W], not {tuple(x.shape)}")
    check(x.dtype in DTYPES, lambda: f"x must be float32, bfloat16 or float16, not {x.dtype}")
    named = {"weight": weight, "bias": bias}
    if not training:
        named |= {"running_mean": running_mean, "running_var": running_var}
    elif stats is not None:
        named |= {"mean": stats[0], "var": stats[1]}
    for name, value in named.items():
        _check_channels(name, value, x)
    if training:
        check(
            x.numel() == 0 or x.numel() > x.shape[1],
            lambda: f"training needs more than one value a channel, x is {tuple(x.shape)}",
        )
        mean, var = batch_statistics(x.detach(), None)[:, 0] if stats is None else stats
    else:
        mean, var = running_mean, running_var
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    y, _, _ = _op(x, weight, bias, mean.detach(), var.detach(), act, training, eps, save)
    return (y, mean, var) if training else (y, None, None)


def _check_channels(name: str, value: torch.Tensor | None, x: torch.Tensor) -> None:
    check(value is not None, lambda: f"{name} is missing")
    check(
        value.shape == x.shape[1:2]
        and value.dtype in (torch.float32, x.dtype)
        and value.device == x.device,
        lambda: (
            f"{name} must be a [{x.shape[1]}] in float32 or {x.dtype} on {x.device}, "
            f"not {tuple(value.shape)} {value.dtype} on {value.device}"
        ),
    )


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    c = shape[1]
    return {
        "x": nhwc((draw(*shape) + draw(c, 1, 1)).to(device, dtype)).requires_grad_(),
        "weight": (1 + 0.3 * draw(c)).to(device).requires_grad_(),
        "bias": (0.3 * draw(c)).to(device).requires_grad_(),
        "running_mean": draw(c).to(device),
        "running_var": (0.5 + draw(c) ** 2).to(device),
    }


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
) -> None:
    affine = (weight, bias, running_mean, running_var)
    forward(x, *affine, "relu", 1e-5, False)
    y, x_max, index = forward(x, *affine, "relu", 1e-5, True)
    for training in (True, False):
        backward(y, x, x_max, index, *affine, "relu", training, 1e-5)


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    """In training, the statistics given."""
    n, c, h, w = shape
    full, pooled = float(n * c * h * w), float(n * c * ((h + 1) // 2) * ((w + 1) // 2))
    return {
        "forward": Cost(3 * full + 9 * pooled, (full + 2 * pooled) * itemsize + pooled),
        "backward": Cost(6 * full + 12 * pooled, (2 * full + 3 * pooled) * itemsize + pooled),
    }


SPEC = KernelSpec("bn_act_pool", reference, bn_act_pool, _make_inputs, _launch, _cost, (STEM,))

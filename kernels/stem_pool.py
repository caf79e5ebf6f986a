"""bn_act_pool: BatchNorm, activation and the stem's 3x3, stride 2, padding 1 max-pool in one pass.

    forward    z = (x - mean)*s + bias, s = weight / sqrt(var + eps)
               y[p, q] = max of act(z) over the 3x3 window centred on x[2p, 2q]
    backward   dz = act'(z) * (sum of dy over the windows whose maximum x is)
               dx, dweight and dbias follow from dz by the equations of bn_act.py, m = N*H*W

dz is zero outside the arg-max, so its sums run over windows, of dy and of the x that won: those of
bn_act over the pooled tensors. That x is written by the forward (`x_max`, beside a one-byte
position 0..8): gathering it later would touch nearly every sector of x. dx is written once,
without atomics: the pixels 2p..2p+1, 2q..2q+1 receive from the windows p..p+1, q..q+1 alone, and 9
comparisons say which point at which.

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

from kernels.activation import REFERENCE, REFERENCE_BACKWARD, activate
from kernels.bn_checks import Norm, Stats, check_inputs, check_norm, reference_gradients
from kernels.bn_stats import Tile, batch_statistics
from kernels.bn_sums import affine, coefficients, gradient, load, normalized, sums
from kernels.launch import cdiv, empty_nhwc, nhwc, run, runs_triton, tl, triton
from kernels.numerics import rounded
from kernels.shapes import STEM
from kernels.spec import Cost, Inputs, KernelSpec, Shape

FORWARD = Tile(1024, 4)
FORWARD_ROWS = 4  # rows of windows a program walks down, each sharing a row of x with the next
BACKWARD = Tile(512, 4)


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
def _preactivation(x, mean, s, b, DTYPE: tl.constexpr):
    """z, rounded to the storage type as eager's."""
    return rounded(normalized(x, mean, s, b), DTYPE).to(tl.float32)


@triton.jit
def _row_maximum(x_ptr, row, column, inside, mean, s, b, W, C, ACT: tl.constexpr):
    """First maximum of act(z) over columns column..column+2 of a row of x: value, x, place.

    row [BLOCK_M] offset of the row, column [BLOCK_M] >= -1, inside [BLOCK_M, BLOCK_C].
    """
    dtype = x_ptr.dtype.element_ty
    for j in tl.static_range(3):
        w = column + j
        ok = inside & ((w >= 0) & (w < W))[:, None]
        x = load(x_ptr, (row + w * C)[:, None], ok)
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
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, y_ptr, x_max_ptr, index_ptr,
    N, H, W, C, P, Q,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(P, ROWS)
    first = tl.program_id(0) % row_blocks * ROWS  # neighbours in time share a row of x
    m = tl.program_id(0) // row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # (n, q)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    n = (m // Q).to(tl.int64)
    q = m % Q
    inside = (m < N * Q)[:, None] & (c < C)
    mean, s, b = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, c, C, eps)
    x_ptr += c
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

        out = (((n * P + p) * Q + q) * C)[:, None] + c
        y = activate(best, "relu") if ACT == "relu" else best
        tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=ok)  # exact: rounded before
        if index_ptr is not None:
            tl.store(x_max_ptr + out, x_best.to(x_max_ptr.dtype.element_ty), mask=ok)
            tl.store(index_ptr + out, place.to(tl.uint8), mask=ok)
        top, x_top, j_top = end, x_end, j_end


@triton.jit
def _window(
    dy_ptr, x_max_ptr, index_ptr, at, inside, mean, s, b,
    ACT: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """Gradient and place of the maximum of the windows at offsets `at` [BLOCK_M, BLOCK_C]. In
    training act' is taken where the gradients arrive, for x is read there anyway; else here."""
    g = load(dy_ptr, at, inside)
    if not TRAINING:
        x = load(x_max_ptr, at, inside)
        g = gradient(g, _preactivation(x, mean, s, b, x_max_ptr.dtype.element_ty), ACT)
    return g, tl.load(index_ptr + at, mask=inside, other=0)


@triton.jit
def _store_dx(
    dx_ptr, x_ptr, offsets, inside, g, mean, s, b, slope, offset,
    ACT: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """dx of one pixel of each 2x2 square from g, the sum of its windows' gradients."""
    if TRAINING:
        x = load(x_ptr, offsets, inside)
        dz = gradient(g, _preactivation(x, mean, s, b, x_ptr.dtype.element_ty), ACT)
        dx = s * dz + (slope * (x - mean) + offset)
    else:
        dx = s * g
    tl.store(dx_ptr + offsets, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, x_max_ptr, index_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps,
    coefficients_ptr, dx_ptr, M, H, W, C, P, Q,
    ACT: tl.constexpr, TRAINING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # (n, p, q)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    q = m % Q
    p = m // Q % P
    n = (m // (P * Q)).to(tl.int64)
    mean, s, b = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, c, C, eps)
    slope = load(coefficients_ptr + C, c, c < C)
    offset = load(coefficients_ptr + 2 * C, c, c < C)

    here = (m < M)[:, None] & (c < C)
    right = here & (q + 1 < Q)[:, None]
    below = here & (p + 1 < P)[:, None]
    both = right & below
    at = m.to(tl.int64)[:, None] * C + c
    g00, i00 = _window(dy_ptr, x_max_ptr, index_ptr, at, here, mean, s, b, ACT, TRAINING)
    g01, i01 = _window(dy_ptr, x_max_ptr, index_ptr, at + C, right, mean, s, b, ACT, TRAINING)
    next_row = at + Q * C
    g10, i10 = _window(dy_ptr, x_max_ptr, index_ptr, next_row, below, mean, s, b, ACT, TRAINING)
    g11, i11 = _window(dy_ptr, x_max_ptr, index_ptr, next_row + C, both, mean, s, b, ACT, TRAINING)

    pixel = (((n * H + 2 * p) * W + 2 * q) * C)[:, None] + c
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
    x: torch.Tensor, norm: Norm, act: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward pass; returns y, x_max [N, C, P, Q] and index (uint8); the last two are
    empty unless `save`."""
    x = nhwc(x)
    n, c, h, w = x.shape
    y, x_max, index = _outputs(x, save)
    p, q = y.shape[2:]
    block_m, block_c = FORWARD.blocks(c)
    run(
        _forward_kernel,
        (cdiv(n * q, block_m) * cdiv(p, FORWARD_ROWS), cdiv(c, block_c)),
        *(x, *norm, y, x_max if save else None, index if save else None, n, h, w, c, p, q),
        ACT=act,
        ROWS=FORWARD_ROWS,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=FORWARD.warps,
    )
    return y, x_max, index


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    x_max: torch.Tensor,
    index: torch.Tensor,
    norm: Norm,
    act: str,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the sums over windows, what follows from them and the pass over x; returns dx and
    float32 [2, C] dweight, dbias."""
    dy, x = nhwc(dy), nhwc(x)
    n, c, h, w = x.shape
    p, q = dy.shape[2:]
    windows = n * p * q
    _, partials = sums(dy, x_max, norm, act)
    dparams, found = coefficients(partials, n * h * w, norm)
    dx = empty_nhwc(n, c, h, w, like=x)
    block_m, block_c = BACKWARD.blocks(c)
    run(
        _backward_kernel,
        (cdiv(windows, block_m), cdiv(c, block_c)),
        *(dy, x, x_max, index, *norm, found, dx, windows, h, w, c, p, q),
        ACT=act,
        TRAINING=training,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=BACKWARD.warps,
    )
    return dx, dparams


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
        return forward(x, Norm(weight, bias, mean, var, eps), act, save)
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
) -> tuple[torch.Tensor, torch.Tensor]:
    norm = Norm(weight, bias, mean, var, eps)
    if runs_triton(dy):
        return backward(dy, x, x_max, index, norm, act, training)
    z = F.batch_norm(x_max, mean, var, weight, bias, False, 0.0, eps)
    dz = REFERENCE_BACKWARD[act](dy, z).float().flatten(2)
    pixels = _pixels(index, x.shape[3]).flatten(2)
    dz = dz.new_zeros(x.shape).flatten(2).scatter_add(2, pixels, dz).view(x.shape)
    dx, *dparams = reference_gradients(dz, x, norm, training)
    return nhwc(dx), torch.stack(dparams)


def _pixels(index: torch.Tensor, width: int) -> torch.Tensor:
    """max_pool2d's flat int64 indices from positions [N, C, P, Q] in the windows."""
    p, q = (torch.arange(size, device=index.device) for size in index.shape[2:])
    return (2 * p[:, None] - 1 + index // 3) * width + 2 * q - 1 + index % 3


@_backward_op.register_fake
def _(dy, x, x_max, index, weight, bias, mean, var, act, training, eps):
    return empty_nhwc(*x.shape, like=x), x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, mean, var, *ctx.options, _ = inputs
    _, x_max, index = output
    ctx.mark_non_differentiable(x_max, index)
    ctx.save_for_backward(x, x_max, index, weight, bias, mean, var)


def _differentiate(ctx, dy, _dx_max, _dindex):
    dx, dparams = _backward_op(dy, *ctx.saved_tensors, *ctx.options)
    weight, bias = ctx.saved_tensors[3:5]
    return dx, dparams[0].to(weight.dtype), dparams[1].to(bias.dtype), *(None,) * 6


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
    check_inputs(x, act, training)
    check_norm(x, Norm(weight, bias, running_mean, running_var, eps), training, stats)
    if training:
        mean, var = stats or batch_statistics(x.detach(), None)[:, 0]
    else:
        mean, var = running_mean, running_var
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    y, _, _ = _op(x, weight, bias, mean.detach(), var.detach(), act, training, eps, save)
    return (y, mean, var) if training else (y, None, None)


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


def _launch(x, weight, bias, running_mean, running_var) -> None:
    norm = Norm(weight, bias, running_mean, running_var, 1e-5)
    forward(x, norm, "relu", False)
    y, x_max, index = forward(x, norm, "relu", True)
    for training in (True, False):
        backward(y, x, x_max, index, norm, "relu", training)


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    """In training, the statistics given."""
    n, c, h, w = shape
    full, pooled = float(n * c * h * w), float(n * c * ((h + 1) // 2) * ((w + 1) // 2))
    return {
        "forward": Cost(3 * full + 9 * pooled, (full + 2 * pooled) * itemsize + pooled),
        "backward": Cost(6 * full + 12 * pooled, (2 * full + 3 * pooled) * itemsize + pooled),
    }


SPEC = KernelSpec("bn_act_pool", reference, bn_act_pool, _make_inputs, _launch, _cost, (STEM,))

"""group_norm_act: GroupNorm, a residual and the activation in one pass after the statistics.

    forward    xhat = (x - mean)*rstd per image and group of C/G channels
               z = weight*xhat + bias [+ residual],  y = act(z)
    backward   dz = dy*act'(z) = dresidual;  dbias = sum dz;  dweight = sum dz*xhat
               c1 = sum weight*dz / m,  c2 = sum weight*dz*xhat / m over a group's m = H*W*C/G
               dx = rstd*(weight*dz - c1 - xhat*c2)                       (Wu and He 2018)

Traffic, in tensors of N*H*W*C elements: forward reads x, then x [and the residual], and writes 1
(eager: reads 4 [5], writes 2 [3]). Backward reads dy and x twice and writes 1; with a residual it
reads dy, x, residual, writes dz, which is the residual's gradient, then reads dz and x and writes
dx. The second reading of x or dz is served by the L2 cache while a batch fits there.

Statistics are robust at mean/std = 100: Welford within a program (`bn_stats`), merged in a fixed
order by Chan's formula. No atomics: each gradient is the same bits in every run. Images are split
into slices of rows, so that a batch of 32 fills the GPU.

Layout: x and residual [N, C, H, W] of one shape and dtype, any strides; copied once if not
channels-last. z is rounded to the storage type before the residual is added and again before the
activation. Where Triton cannot run the op is `reference`.
"""

import torch
import torch.nn.functional as F

from kernels.activation import ACTS, REFERENCE, REFERENCE_BACKWARD, activate, activate_grad
from kernels.bn_stats import Tile, _moments, store_partial, tile_position
from kernels.launch import (
    cdiv,
    check,
    empty_nhwc,
    multiprocessors,
    next_power_of_2,
    nhwc,
    run,
    runs_triton,
    tl,
    triton,
)
from kernels.numerics import rounded
from kernels.shapes import STAGES
from kernels.spec import Cost, Inputs, KernelSpec, Shape

REDUCING = Tile(2048, 4, 8)
APPLYING = Tile(2048, 4)
MERGE_ELEMENTS = 1024  # partials of a group that a program holds at a time
GROUPS = 32  # of SPEC: every stage of a ResNet divides by it

Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    act: str = "relu",
    eps: float = 1e-5,
) -> torch.Tensor:
    """`group_norm_act` in plain PyTorch; normalises in the parameters' dtype, rounds to x's."""
    z = F.group_norm(x.to(weight.dtype), num_groups, weight, bias, eps).to(x.dtype)
    return REFERENCE[act](z if residual is None else z + residual)


@triton.jit
def _statistics_kernel(
    x_ptr, partials_ptr, HW, C, programs, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """partials [N, 2, programs, C]: mean and M2 of every channel of an image over a slice."""
    n = tl.program_id(1).to(tl.int64)
    program, _, c = tile_position(C, BLOCK_M, BLOCK_C)
    mean, m2 = _moments(x_ptr + n * HW * C, HW, C, programs, BLOCK_M, BLOCK_C)
    store_partial(partials_ptr + n * 2 * programs * C, mean, m2, program, programs, c, C, c < C)


@triton.jit
def _merge_statistics_kernel(
    partials_ptr, mean_ptr, rstd_ptr, HW, C, G, programs, rows, eps,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """mean and rstd [N, G] of group n*G + g, in two rounds over its partials."""
    n = tl.program_id(0) // G
    K = C // G
    k = tl.arange(0, BLOCK_K)[None, :]
    partials_ptr += n.to(tl.int64) * 2 * programs * C + tl.program_id(0) % G * K + k
    tiles = tl.cdiv(HW, rows)
    size = HW * K * 1.0
    total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)[:, None]
        inside = (p < programs) & (k < K)
        count = _rows_of(p, programs, tiles, rows, HW)
        total += count * tl.load(partials_ptr + p * C, mask=inside, other=0.0)
    mean = tl.sum(total) / size
    m2 = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    away = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)[:, None]
        inside = (p < programs) & (k < K)
        count = _rows_of(p, programs, tiles, rows, HW)
        far = tl.load(partials_ptr + p * C, mask=inside, other=0.0) - mean
        far = tl.where(inside, far, 0.0)
        away += count * far
        m2 += tl.load(partials_ptr + (programs + p) * C, mask=inside, other=0.0)
        m2 += count * far * far
    # the first mean has lost digits where it is far from zero: what it is off by corrects both
    off = tl.sum(away) / size
    var = tl.sum(m2) / size - off * off
    tl.store(mean_ptr + tl.program_id(0), mean + off)
    tl.store(rstd_ptr + tl.program_id(0), tl.rsqrt(var + eps))


@triton.jit
def _rows_of(p, programs, tiles, rows, HW):
    """Rows that partials p [BLOCK_P, 1] cover: the tiles p, p + programs, ... of `rows` rows."""
    short = tl.where(p == (tiles - 1) % programs, tiles * rows - HW, 0)
    return tl.where(p < programs, tl.cdiv(tiles - p, programs) * rows - short, 0).to(tl.float32)


@triton.jit
def _load(ptr, offsets, inside):
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, c, C, G):
    """mean and rstd of image n, weight and bias, of the channels c: [1, BLOCK_C] each."""
    group = n * G + c // (C // G)
    mean = _load(mean_ptr, group, c < C)
    rstd = _load(rstd_ptr, group, c < C)
    weight = _load(weight_ptr, c, c < C)
    bias = _load(bias_ptr, c, c < C)
    return mean[None, :], rstd[None, :], weight[None, :], bias[None, :]


@triton.jit
def _preactivation(xhat, weight, bias, residual, HAS_RESIDUAL: tl.constexpr, DTYPE: tl.constexpr):
    # an explicit fma, so that both passes see the same bits
    z = rounded(tl.fma(xhat, weight, bias), DTYPE).to(tl.float32)
    if HAS_RESIDUAL:
        z = rounded(z + residual, DTYPE).to(tl.float32)
    return z


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, y_ptr, HW, C, G,
    ACT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    tile, rows, c = tile_position(C, BLOCK_M, BLOCK_C)
    mean, rstd, weight, bias = _channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, c, C, G)
    rows += tile * BLOCK_M
    inside = (rows < HW) & (c < C)[None, :]
    offsets = (n * HW + rows) * C + c[None, :]
    x = _load(x_ptr, offsets, inside)
    residual = _load(residual_ptr, offsets, inside) if HAS_RESIDUAL else x
    dtype = y_ptr.dtype.element_ty
    z = _preactivation((x - mean) * rstd, weight, bias, residual, HAS_RESIDUAL, dtype)
    tl.store(y_ptr + offsets, rounded(activate(z, ACT), dtype), mask=inside)


@triton.jit
def _sums_kernel(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dz_ptr, partials_ptr,
    HW, C, G, programs,
    ACT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials [N, programs, 2, C]: sums of dz*xhat and of dz over a slice; dz if there is a
    residual."""
    n = tl.program_id(1).to(tl.int64)
    program, lanes, c = tile_position(C, BLOCK_M, BLOCK_C)
    mean, rstd, weight, bias = _channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, c, C, G)
    dtype = x_ptr.dtype.element_ty
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(program * BLOCK_M, HW, programs * BLOCK_M):
        rows = first + lanes
        inside = (rows < HW) & (c < C)[None, :]
        offsets = (n * HW + rows) * C + c[None, :]
        xhat = (_load(x_ptr, offsets, inside) - mean) * rstd
        residual = _load(residual_ptr, offsets, inside) if HAS_RESIDUAL else xhat
        z = _preactivation(xhat, weight, bias, residual, HAS_RESIDUAL, dtype)
        dz = _load(dy_ptr, offsets, inside) * activate_grad(z, ACT)
        if HAS_RESIDUAL:
            stored = rounded(dz, dtype)
            tl.store(dz_ptr + offsets, stored, mask=inside)
            dz = stored.to(tl.float32)  # sums and the second pass use the same dz
        sum_dz += dz
        sum_dz_xhat += dz * xhat
    partials_ptr += (n * programs + program) * 2 * C + c
    tl.store(partials_ptr, tl.sum(sum_dz_xhat, 0), mask=c < C)
    tl.store(partials_ptr + C, tl.sum(sum_dz, 0), mask=c < C)


@triton.jit
def _merge_sums_kernel(
    partials_ptr, weight_ptr, c1_ptr, c2_ptr, HW, C, G, programs,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // G
    K = C // G
    k = tl.arange(0, BLOCK_K)
    weight = _load(weight_ptr + tl.program_id(0) % G * K, k, k < K)[None, :]
    partials_ptr += n.to(tl.int64) * 2 * programs * C + tl.program_id(0) % G * K + k[None, :]
    c1 = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    c2 = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)[:, None]
        inside = (p < programs) & (k < K)[None, :]
        c2 += weight * _load(partials_ptr, p * 2 * C, inside)
        c1 += weight * _load(partials_ptr, p * 2 * C + C, inside)
    size = HW * K * 1.0
    tl.store(c1_ptr + tl.program_id(0), tl.sum(c1) / size)
    tl.store(c2_ptr + tl.program_id(0), tl.sum(c2) / size)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr, dx_ptr, HW, C, G,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    tile, rows, c = tile_position(C, BLOCK_M, BLOCK_C)
    mean, rstd, weight, bias = _channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, c, C, G)
    c1, c2, _, _ = _channels(c1_ptr, c2_ptr, weight_ptr, bias_ptr, n, c, C, G)
    rows += tile * BLOCK_M
    inside = (rows < HW) & (c < C)[None, :]
    offsets = (n * HW + rows) * C + c[None, :]
    xhat = (_load(x_ptr, offsets, inside) - mean) * rstd
    dtype = dx_ptr.dtype.element_ty
    z = _preactivation(xhat, weight, bias, xhat, False, dtype)
    dz = _load(dy_ptr, offsets, inside) * activate_grad(z, ACT)
    dx = rstd * (weight * dz - c1 - xhat * c2)
    tl.store(dx_ptr + offsets, rounded(dx, dtype), mask=inside)


def _plan(x: torch.Tensor) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_C and the slices of an image that give every multiprocessor enough to do."""
    n, c, h, w = x.shape
    block_m, block_c = REDUCING.blocks(c)
    wanted = cdiv(REDUCING.programs * multiprocessors(x.device), n * cdiv(c, block_c))
    return block_m, block_c, min(cdiv(h * w, block_m), wanted)


def _merge_blocks(programs: int, group: int) -> dict[str, int]:
    block_k = next_power_of_2(group)
    block_p = min(next_power_of_2(programs), max(1, MERGE_ELEMENTS // block_k))
    return {
        "BLOCK_P": block_p,
        "BLOCK_K": block_k,
        "num_warps": 4 if block_k * block_p > 256 else 1,
    }


def _apply_launch(x: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    n, c, h, w = x.shape
    block_m, block_c = APPLYING.blocks(c)
    grid = (cdiv(h * w, block_m) * cdiv(c, block_c), n)
    return grid, {"BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": APPLYING.warps}


def forward(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    act: str,
    eps: float,
) -> Tensors3:
    """Launch the statistics, their merge and y = act(...); returns y [N, C, H, W] channels-last,
    mean and rstd float32 [N, G]."""
    x = nhwc(x)
    n, c, h, w = x.shape
    y, mean, rstd = _outputs(x, num_groups)
    if y.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    hw, group = h * w, c // num_groups
    block_m, block_c, programs = _plan(x)
    partials = torch.empty(n, 2, programs, c, dtype=torch.float32, device=x.device)
    run(
        _statistics_kernel, (programs * cdiv(c, block_c), n), x, partials, hw, c, programs,
        BLOCK_M=block_m, BLOCK_C=block_c, num_warps=REDUCING.warps,
    )  # fmt: skip
    run(
        _merge_statistics_kernel, (n * num_groups,), partials, mean, rstd,
        hw, c, num_groups, programs, block_m, eps, **_merge_blocks(programs, group),
    )  # fmt: skip
    grid, blocks = _apply_launch(x)
    has_residual = residual is not None
    run(
        _forward_kernel, grid, x, nhwc(residual) if has_residual else x, weight, bias, mean, rstd,
        y, hw, c, num_groups, ACT=act, HAS_RESIDUAL=has_residual, **blocks,
    )  # fmt: skip
    return y, mean, rstd


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    act: str,
) -> Tensors3:
    """Launch the gradients; returns dx and dresidual [N, C, H, W] channels-last (dresidual empty
    without a residual) and float32 [2, C]: dweight, dbias."""
    dy, x = nhwc(dy), nhwc(x)
    n, c, h, w = x.shape
    dx, dz, dparams = _gradients(x, residual)
    if dx.numel() == 0:
        return dx, dz, dparams.zero_()
    hw, has_residual = h * w, residual is not None
    affine = (weight, bias, mean, rstd)
    block_m, block_c, programs = _plan(x)
    partials = torch.empty(n, programs, 2, c, dtype=torch.float32, device=x.device)
    run(
        _sums_kernel, (programs * cdiv(c, block_c), n),
        dy, x, nhwc(residual) if has_residual else x, *affine, dz, partials,
        hw, c, num_groups, programs,
        ACT=act, HAS_RESIDUAL=has_residual, BLOCK_M=block_m, BLOCK_C=block_c,
        num_warps=REDUCING.warps,
    )  # fmt: skip
    c1, c2 = torch.empty(2, n, num_groups, dtype=torch.float32, device=x.device)
    run(
        _merge_sums_kernel, (n * num_groups,), partials, weight, c1, c2, hw, c, num_groups,
        programs, **_merge_blocks(programs, c // num_groups),
    )  # fmt: skip
    grid, blocks = _apply_launch(x)
    run(
        _backward_kernel, grid, dz if has_residual else dy, x, *affine, c1, c2, dx,
        hw, c, num_groups, ACT="identity" if has_residual else act, **blocks,
    )  # fmt: skip
    return dx, dz, torch.sum(partials, (0, 1), out=dparams)


def _outputs(x: torch.Tensor, num_groups: int) -> Tensors3:
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=torch.float32) for _ in range(2))
    return empty_nhwc(*x.shape, like=x), mean, rstd


def _gradients(x: torch.Tensor, residual: torch.Tensor | None) -> Tensors3:
    dresidual = x.new_empty(0) if residual is None else empty_nhwc(*x.shape, like=x)
    dparams = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    return empty_nhwc(*x.shape, like=x), dresidual, dparams


@torch.library.custom_op("lapis::group_norm_act", mutates_args=())
def _op(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    act: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if runs_triton(x):
        return forward(x, num_groups, weight, bias, residual, act, eps)
    outputs = _outputs(x, num_groups)
    outputs[0].copy_(reference(x, num_groups, weight, bias, residual=residual, act=act, eps=eps))
    groups = x.float().reshape(x.shape[0], num_groups, -1)
    var, mean = torch.var_mean(groups, 2, correction=0)
    outputs[1].copy_(mean)
    outputs[2].copy_(torch.rsqrt(var + eps))
    return outputs


@_op.register_fake
def _(x, num_groups, weight, bias, residual, act, eps):
    return _outputs(x, num_groups)


@torch.library.custom_op("lapis::group_norm_act_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    act: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if runs_triton(dy):
        return backward(dy, x, num_groups, weight, bias, residual, mean, rstd, act)
    outputs = _gradients(x, residual)
    # autograd is out of reach inside an op
    n, c, h, w = x.shape
    wide = x.to(weight.dtype).contiguous()
    z = F.group_norm(wide, num_groups, weight, bias, eps).to(x.dtype)
    dz = REFERENCE_BACKWARD[act](dy, z if residual is None else z + residual)
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        dz.to(weight.dtype).contiguous(), wide, mean.to(weight.dtype), rstd.to(weight.dtype),
        weight, n, c, h * w, num_groups, [True] * 3,
    )  # fmt: skip
    outputs[0].copy_(dx)
    if residual is not None:
        outputs[1].copy_(dz)
    outputs[2].copy_(torch.stack((dweight, dbias)))
    return outputs


@_backward_op.register_fake
def _(dy, x, num_groups, weight, bias, residual, mean, rstd, act, eps):
    return _gradients(x, residual)


def _save(ctx, inputs, output) -> None:
    x, ctx.num_groups, weight, bias, residual, ctx.act, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, residual, *output[1:])


def _differentiate(ctx, dy, _dmean, _drstd):
    x, weight, bias, residual, mean, rstd = ctx.saved_tensors
    dx, dresidual, dparams = _backward_op(
        dy, x, ctx.num_groups, weight, bias, residual, mean, rstd, ctx.act, ctx.eps
    )
    dweight, dbias = dparams.to(weight.dtype)
    return dx, None, dweight, dbias, None if residual is None else dresidual, None, None


_op.register_autograd(_differentiate, setup_context=_save)


def group_norm_act(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    act: str = "relu",
    eps: float = 1e-5,
) -> torch.Tensor:
    """act(group_norm(x, num_groups) [+ residual]) for x [N, C, H, W] in float32, bf16 or fp16;
    returns channels-last [N, C, H, W].

    num_groups divides C; 1 is LayerNorm over C, H, W. weight, bias: [C], both float32 or both x's
    dtype. residual: like x.
    Raises ValueError when a shape, dtype or device does not fit or `act` is unknown.
    """
    check(act in ACTS, lambda: f"act must be one of {', '.join(ACTS)}, not {act!r}")
    check(x.dim() == 4, lambda: f"x must be [N, C, H, W], not {tuple(x.shape)}")
    check(
        x.dtype in (torch.float32, torch.bfloat16, torch.float16),
        lambda: f"x must be float32, bfloat16 or float16, not {x.dtype}",
    )
    check(
        num_groups >= 1 and x.shape[1] % num_groups == 0,
        lambda: f"num_groups must divide the {x.shape[1]} channels of x, {num_groups} does not",
    )
    for name, value in (("weight", weight), ("bias", bias)):
        check(
            value.shape == x.shape[1:2]
            and value.dtype == weight.dtype
            and value.dtype in (torch.float32, x.dtype)
            and value.device == x.device,
            lambda name=name, value=value: (
                f"{name} {_describe(value)} must be [{x.shape[1]}] in float32 or {x.dtype} "
                f"on {x.device}"
            ),
        )
    check(
        residual is None
        or (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device),
        lambda: f"residual {_describe(residual)} must be like x {_describe(x)}",
    )
    return _op(x, num_groups, weight, bias, residual, act, eps)[0]


def _describe(x: torch.Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    c = shape[1]
    return {
        "x": nhwc((draw(*shape) + draw(c, 1, 1)).to(device, dtype)).requires_grad_(),
        "num_groups": GROUPS if c % GROUPS == 0 else 1,
        "weight": (1 + 0.3 * draw(c)).to(device).requires_grad_(),
        "bias": (0.3 * draw(c)).to(device).requires_grad_(),
        "residual": nhwc(draw(*shape).to(device, dtype)).requires_grad_(),
    }


def _launch(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
) -> None:
    for addend in (None, residual):
        y, mean, rstd = forward(x, num_groups, weight, bias, addend, "relu", 1e-5)
        backward(y, x, num_groups, weight, bias, addend, mean, rstd, "relu")


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    """With a residual; x, and in the backward dz, once from memory and once from the L2."""
    n = float(torch.Size(shape).numel())
    return {"forward": Cost(9 * n, 3 * n * itemsize), "backward": Cost(14 * n, 5 * n * itemsize)}


SPEC = KernelSpec("group_norm_act", reference, group_norm_act, _make_inputs, _launch, _cost, STAGES)

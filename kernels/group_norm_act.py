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

from kernels.activation import REFERENCE, REFERENCE_BACKWARD, activate, activate_grad, check_act
from kernels.bn_stats import Tile, _moments, combine, store_partial, tile_position
from kernels.launch import (
    cdiv,
    check,
    check_image,
    describe,
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

TILE = Tile(2048, 4, 8)
MERGED = 4096  # partials of a group, slices x channels, that one program holds
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
    x_ptr, partials_ptr, HW, C, slices, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """partials [N, 2, slices, C]: mean and M2 of every channel of an image over a slice."""
    n = tl.program_id(1).to(tl.int64)
    p, _, c = tile_position(C, BLOCK_M, BLOCK_C)
    mean, m2 = _moments(x_ptr + n * HW * C, HW, C, slices, BLOCK_M, BLOCK_C)
    store_partial(partials_ptr + n * 2 * slices * C, mean, m2, p, slices, c, C, c < C)


@triton.jit
def _merge_statistics_kernel(
    partials_ptr, mean_ptr, rstd_ptr, HW, C, G, slices, rows, eps, BLOCK: tl.constexpr
):
    """mean and rstd [N, G]. Slice p covers the tiles p, p + slices, ... of `rows` rows."""
    p, c, inside = _group_partials(C, G, slices, BLOCK)
    tiles = tl.cdiv(HW, rows)
    short = tl.where(p == (tiles - 1) % slices, tiles * rows - HW, 0)
    count = tl.where(inside, tl.cdiv(tiles - p, slices) * rows - short, 0).to(tl.float32)
    partials_ptr += (tl.program_id(0) // G).to(tl.int64) * 2 * slices * C
    mean = _load(partials_ptr, p * C + c, inside)
    m2 = _load(partials_ptr + slices * C, p * C + c, inside)
    count, mean, m2 = combine(count, mean, m2)
    group = tl.program_id(0) + tl.arange(0, 1)
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, tl.rsqrt(m2 / count + eps))


@triton.jit
def _group_partials(C, G, slices, BLOCK: tl.constexpr):
    """Slice and channel of every partial of this program's group, n*G + g, and whether it is
    one: [BLOCK, 1] each."""
    K = C // G
    i = tl.arange(0, BLOCK)[:, None]
    return i // K, tl.program_id(0) % G * K + i % K, i < slices * K


@triton.jit
def _load(ptr, offsets, inside):
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _of_groups(ptr, n, cols, C, G):
    """What [N, G] holds for the channels `cols` of image n."""
    return _load(ptr, n * G + cols // (C // G), cols < C)


@triton.jit
def _channels(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, C, G):
    """weight, bias, and the mean and rstd of image n, of the channels `cols`."""
    weight = _load(weight_ptr, cols, cols < C)
    bias = _load(bias_ptr, cols, cols < C)
    return weight, bias, _of_groups(mean_ptr, n, cols, C, G), _of_groups(rstd_ptr, n, cols, C, G)


@triton.jit
def _preactivation(xhat, weight, bias, residual_ptr, offsets, inside, DTYPE: tl.constexpr):
    # an explicit fma, so that both passes see the same bits
    z = rounded(tl.fma(xhat, weight, bias), DTYPE).to(tl.float32)
    if residual_ptr is not None:
        z = rounded(z + _load(residual_ptr, offsets, inside), DTYPE).to(tl.float32)
    return z


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, y_ptr, HW, C, G,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    tile, lanes, c = tile_position(C, BLOCK_M, BLOCK_C)
    rows, cols = tile * BLOCK_M + lanes, c[None, :]
    weight, bias, mean, rstd = _channels(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, C, G)
    inside = (rows < HW) & (cols < C)
    offsets = (n * HW + rows) * C + cols
    xhat = (_load(x_ptr, offsets, inside) - mean) * rstd
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    z = _preactivation(xhat, weight, bias, residual_ptr, offsets, inside, DTYPE)
    tl.store(y_ptr + offsets, rounded(activate(z, ACT), DTYPE), mask=inside)


@triton.jit
def _sums_kernel(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dz_ptr, partials_ptr,
    HW, C, G, slices, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials [N, slices, 2, C]: sums of dz*xhat and of dz over a slice; dz if there is a
    residual."""
    n = tl.program_id(1).to(tl.int64)
    p, lanes, c = tile_position(C, BLOCK_M, BLOCK_C)
    cols = c[None, :]
    weight, bias, mean, rstd = _channels(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, C, G)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(p * BLOCK_M, HW, slices * BLOCK_M):
        rows = first + lanes
        inside = (rows < HW) & (cols < C)
        offsets = (n * HW + rows) * C + cols
        xhat = (_load(x_ptr, offsets, inside) - mean) * rstd
        z = _preactivation(xhat, weight, bias, residual_ptr, offsets, inside, DTYPE)
        dz = _load(dy_ptr, offsets, inside) * activate_grad(z, ACT)
        if residual_ptr is not None:
            stored = rounded(dz, DTYPE)
            tl.store(dz_ptr + offsets, stored, mask=inside)
            dz = stored.to(tl.float32)  # sums and the second pass use the same dz
        sum_dz += dz
        sum_dz_xhat += dz * xhat
    partials_ptr += (n * slices + p) * 2 * C + c
    tl.store(partials_ptr, tl.sum(sum_dz_xhat, 0), mask=c < C)
    tl.store(partials_ptr + C, tl.sum(sum_dz, 0), mask=c < C)


@triton.jit
def _merge_sums_kernel(
    partials_ptr, weight_ptr, c1_ptr, c2_ptr, HW, C, G, slices, BLOCK: tl.constexpr
):
    """c1 and c2 [N, G]."""
    p, c, inside = _group_partials(C, G, slices, BLOCK)
    partials_ptr += (tl.program_id(0) // G).to(tl.int64) * 2 * slices * C
    weight = _load(weight_ptr, c, inside)
    c2 = tl.sum(weight * _load(partials_ptr, p * 2 * C + c, inside))
    c1 = tl.sum(weight * _load(partials_ptr + C, p * 2 * C + c, inside))
    size = C // G * 1.0 * HW
    tl.store(c1_ptr + tl.program_id(0), c1 / size)
    tl.store(c2_ptr + tl.program_id(0), c2 / size)


@triton.jit
def _backward_kernel(
    dz_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr, dx_ptr, HW, C, G,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From dz with ACT "identity", from dy with the activation of a forward without residual."""
    n = tl.program_id(1).to(tl.int64)
    tile, lanes, c = tile_position(C, BLOCK_M, BLOCK_C)
    rows, cols = tile * BLOCK_M + lanes, c[None, :]
    weight, bias, mean, rstd = _channels(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, C, G)
    c1 = _of_groups(c1_ptr, n, cols, C, G)
    c2 = _of_groups(c2_ptr, n, cols, C, G)
    inside = (rows < HW) & (cols < C)
    offsets = (n * HW + rows) * C + cols
    xhat = (_load(x_ptr, offsets, inside) - mean) * rstd
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    z = _preactivation(xhat, weight, bias, None, offsets, inside, DTYPE)
    dz = _load(dz_ptr, offsets, inside) * activate_grad(z, ACT)
    dx = rstd * (weight * dz - c1 - xhat * c2)
    tl.store(dx_ptr + offsets, rounded(dx, DTYPE), mask=inside)


def _plan(x: torch.Tensor, num_groups: int):
    """Into how many slices every image is cut; the grids slice by slice and tile by tile; the
    options of these passes, and of merging a group's slices."""
    n, c, h, w = x.shape
    group = c // num_groups
    block_m, block_c = TILE.blocks(c)
    columns, tiles = cdiv(c, block_c), cdiv(h * w, block_m)
    # enough for every multiprocessor
    slices = cdiv(TILE.programs * multiprocessors(x.device), n * columns)
    slices = min(tiles, slices, max(1, MERGED // group))
    tile = {"BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": TILE.warps}
    block = next_power_of_2(slices * group)
    merge = {"BLOCK": block, "num_warps": min(8, max(1, block // 256))}
    return slices, (slices * columns, n), (tiles * columns, n), tile, merge


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
    residual = None if residual is None else nhwc(residual)
    y, mean, rstd = _outputs(x, num_groups)
    if y.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    n, c, h, w = x.shape
    sizes = (h * w, c, num_groups)
    slices, slice_grid, tile_grid, tile, merge = _plan(x, num_groups)
    partials = torch.empty(n, 2, slices, c, dtype=torch.float32, device=x.device)
    run(_statistics_kernel, slice_grid, x, partials, h * w, c, slices, **tile)
    args = (partials, mean, rstd, *sizes, slices, tile["BLOCK_M"], eps)
    run(_merge_statistics_kernel, (n * num_groups,), *args, **merge)
    args = (x, residual, weight, bias, mean, rstd, y, *sizes)
    run(_forward_kernel, tile_grid, *args, ACT=act, **tile)
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
    residual = None if residual is None else nhwc(residual)
    dx, dz, dparams = _gradients(x, residual)
    if dx.numel() == 0:
        return dx, dz, dparams.zero_()
    n, c, h, w = x.shape
    sizes, channels = (h * w, c, num_groups), (weight, bias, mean, rstd)
    slices, slice_grid, tile_grid, tile, merge = _plan(x, num_groups)
    partials = torch.empty(n, slices, 2, c, dtype=torch.float32, device=x.device)
    args = (dy, x, residual, *channels, dz, partials, *sizes, slices)
    run(_sums_kernel, slice_grid, *args, ACT=act, **tile)
    c1, c2 = torch.empty(2, n, num_groups, dtype=torch.float32, device=x.device)
    args = (partials, weight, c1, c2, *sizes, slices)
    run(_merge_sums_kernel, (n * num_groups,), *args, **merge)
    if residual is not None:
        dy, act = dz, "identity"
    args = (dy, x, *channels, c1, c2, dx, *sizes)
    run(_backward_kernel, tile_grid, *args, ACT=act, **tile)
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
) -> Tensors3:
    if runs_triton(x):
        return forward(x, num_groups, weight, bias, residual, act, eps)
    y = reference(x, num_groups, weight, bias, residual=residual, act=act, eps=eps)
    groups = x.float().unflatten(1, (num_groups, -1))
    var, mean = torch.var_mean(groups, (2, 3, 4), correction=0)
    return nhwc(y), mean, torch.rsqrt(var + eps)


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
) -> Tensors3:
    if runs_triton(dy):
        return backward(dy, x, num_groups, weight, bias, residual, mean, rstd, act)
    n, c, h, w = x.shape
    z = reference(x, num_groups, weight, bias, residual=residual, act="identity", eps=eps)
    dz = REFERENCE_BACKWARD[act](dy, z)
    wide = (t.to(weight.dtype).contiguous() for t in (dz, x, mean, rstd))
    dx, *dparams = torch.ops.aten.native_group_norm_backward(
        *wide, weight, n, c, h * w, num_groups, [True] * 3
    )
    # an op must not return its input, which dz may be
    dresidual = x.new_empty(0) if residual is None else nhwc(dz).clone()
    return nhwc(dx.to(x.dtype)), dresidual, torch.stack(dparams).float()


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
    check_act(act)
    check_image("x", x)
    check(
        num_groups >= 1 and x.shape[1] % num_groups == 0,
        lambda: f"num_groups must divide the {x.shape[1]} channels of x, {num_groups} does not",
    )
    for name, value in (("weight", weight), ("bias", bias)):
        check(
            (value.shape, value.dtype, value.device) == (x.shape[1:2], weight.dtype, x.device)
            and value.dtype in (torch.float32, x.dtype),
            lambda name=name, value=value: (
                f"{name} {describe(value)} must be [{x.shape[1]}] in float32 or {x.dtype} "
                f"on {x.device}"
            ),
        )
    check(
        residual is None
        or (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device),
        lambda: f"residual {describe(residual)} must be like x {describe(x)}",
    )
    return _op(x, num_groups, weight, bias, residual, act, eps)[0]


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


def _launch(x: torch.Tensor, residual: torch.Tensor, **others) -> None:
    for addend in (None, residual):
        inputs = {"x": x, "residual": addend, "act": "relu", **others}
        y, mean, rstd = forward(**inputs, eps=1e-5)
        backward(dy=y, mean=mean, rstd=rstd, **inputs)


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    """With a residual; x, and in the backward dz, once from memory and once from the L2."""
    n = float(torch.Size(shape).numel())
    return {"forward": Cost(9 * n, 3 * n * itemsize), "backward": Cost(14 * n, 5 * n * itemsize)}


SPEC = KernelSpec("group_norm_act", reference, group_norm_act, _make_inputs, _launch, _cost, STAGES)

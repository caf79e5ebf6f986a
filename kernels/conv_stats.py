"""conv_stats: a convolution that delivers BatchNorm's statistics of its output.

    forward    y = conv(x), mean = E[y], var = E[(y - mean)^2] over N, P, Q
    prologue   x = act(norm(x')) of the unit before, made on load (`conv_prologue`); launcher only
    epilogue   y = conv(x) + residual, rounded once, where the BatchNorm comes after an addition, as
               in blocks with pre-activation; launcher only
    backward   dx, dW by ATen (cuDNN), dW by conv_wgrad where that is asked for; bn_act's backward
               holds the training formula, so mean and var take no gradient

Traffic: x, W and y once each; the statistics save the pass over y that BatchNorm makes for them
(N*P*Q*K elements). They are those of the rounded y: each tile writes the mean of its rows and the
sum of squares M2 about it, a second kernel merges the tiles in a fixed order by Chan's formula.

Layouts: see `conv_gemm`. Where Triton cannot run the op is `reference`.
"""

import torch
import torch.nn.functional as F

from kernels.bn_checks import Norm
from kernels.bn_stats import merge
from kernels.conv_gemm import (
    IMAGE_CHANNELS,
    SITES,
    Tile,
    choose,
    conv_cost,
    convolve,
    empty_output,
    make_conv_inputs,
    prepared,
)
from kernels.conv_prologue import Normed, stored_h
from kernels.conv_wgrad import conv_wgrad
from kernels.launch import cdiv, nhwc, runs_triton
from kernels.spec import Cost, KernelSpec, Shape


def reference(
    x: torch.Tensor, weight: torch.Tensor, stride: int = 1, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """conv(x) in plain PyTorch, and mean and biased variance per filter of what it rounded to."""
    y = F.conv2d(x, weight, stride=stride, padding=padding)
    wide = y.detach().to(torch.promote_types(y.dtype, torch.float32))
    if wide.shape[0] == 0:
        return y, *wide.new_zeros((2, y.shape[1]))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return y, mean, var


def forward(
    h: torch.Tensor | Normed,
    weight: torch.Tensor,
    stride: int,
    padding: int,
    tile: Tile | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch y = conv(h) [+ residual] and the merge of its statistics, h [N, C, H, W] stored or
    made on load, residual [N, K, P, Q] of its dtype; returns y and float32 [2, K]: means, then
    biased variances (zeros for an empty batch)."""
    x = stored_h(h)
    y = empty_output(x, weight, stride, padding)
    k, rows = y.shape[1], y.numel() // y.shape[1]
    if not rows:
        return y, torch.zeros((2, k), dtype=torch.float32, device=x.device)
    tile = tile or choose(x, k, rows)
    tiles = cdiv(rows, tile.block_m)
    partials = torch.empty((2, tiles, k), dtype=torch.float32, device=x.device)
    convolve(h, weight, y, stride, padding, tile, partials=partials, residual=residual)
    return y, merge(partials, rows, tile.block_m)


@torch.library.custom_op("lapis::conv_stats", mutates_args=())
def _op(
    x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int, own_wgrad: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    if runs_triton(x):
        return forward(x, weight, stride, padding)
    y, mean, var = reference(x, weight, stride, padding)
    return nhwc(y), torch.stack((mean, var))


@_op.register_fake
def _(x, weight, stride, padding, own_wgrad=False):
    y = empty_output(x, weight, stride, padding)
    return y, x.new_empty((2, y.shape[1]), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.stride, ctx.padding, ctx.own_wgrad = inputs
    ctx.save_for_backward(x, weight)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dy, _):
    x, weight = ctx.saved_tensors
    dy, steps, pads = nhwc(dy), [ctx.stride] * 2, [ctx.padding] * 2
    wants_dx, wants_dw = ctx.needs_input_grad[:2]
    mask = [wants_dx, wants_dw and not ctx.own_wgrad, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, steps, pads, [1, 1], False, [0, 0], 1, mask
    )
    if wants_dw and ctx.own_wgrad:
        dw = conv_wgrad(dy, x, weight.shape[2:], stride=ctx.stride, padding=ctx.padding)
        dw = dw.to(weight.dtype)
    return dx, dw, None, None, None


_op.register_autograd(_differentiate, setup_context=_save)


def conv_stats(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    own_wgrad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolve x [N, C, H, W] with weight [K, C, R, S], which is cast to x's dtype (both to
    autocast's where it is on). own_wgrad: the gradient of weight by `conv_wgrad`.

    Returns y [N, K, P, Q] channels-last in that dtype, differentiable in x and weight, and the
    mean and biased variance per filter of the rounded y: float32 [K], without gradients, zeros
    for an empty batch. Raises ValueError on shapes, dtypes and devices the kernels do
    not take: C neither a multiple of 8 nor up to 4, K no multiple of 8, groups, float64.
    """
    x, weight = prepared(x, weight, stride, padding)
    y, statistics = _op(x, weight, stride, padding, own_wgrad)
    return y, statistics[0], statistics[1]


def _launch(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> None:
    y, _ = forward(x, weight, stride, padding)
    if x.shape[1] > IMAGE_CHANNELS:
        channels = torch.empty(x.shape[1], device=x.device)
        made = Normed(x, Norm(*[channels] * 4, 1e-5), "relu")
        for h in (x, made):
            forward(h, weight, stride, padding, residual=y)
        forward(made, weight, stride, padding)


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    return conv_cost(shape, itemsize, residual=False)


SPEC = KernelSpec("conv_stats", reference, conv_stats, make_conv_inputs, _launch, _cost, SITES)

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
channels-last. Sums are float32 in a fixed order. The passes are in bn_passes.py, the sums of the
backward in bn_sums.py, the statistics in bn_stats.py. Where Triton cannot run the op is
`reference`.
"""

import torch
import torch.nn.functional as F

from kernels.activation import MASK_ACTS, REFERENCE, REFERENCE_BACKWARD
from kernels.bn_checks import (
    Norm,
    Stats,
    check_inputs,
    check_norm,
    describe,
    reference_gradients,
)
from kernels.bn_passes import apply, backward, empty_outputs, forward, keeps_mask
from kernels.bn_stats import FOLD_ABOVE, batch_statistics, statistics
from kernels.bn_stats import reference as reference_statistics
from kernels.bn_sums import coefficients, kind_of, sums
from kernels.launch import check, empty_nhwc, nhwc, runs_triton
from kernels.shapes import STAGES
from kernels.spec import Cost, Inputs, KernelSpec, Shape


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


def pack(positive: torch.Tensor) -> torch.Tensor:
    """The kernels' mask in plain PyTorch: bool [N, C, H, W] -> uint8 [N*H*W, ceil(C/8)], the
    lowest bit first."""
    rows = positive.permute(0, 2, 3, 1).flatten(0, 2).to(torch.uint8)
    bits = F.pad(rows, (0, -rows.shape[1] % 8)).unflatten(1, (-(-rows.shape[1] // 8), 8))
    return (bits << torch.arange(8, device=rows.device)).sum(2, dtype=torch.uint8)


def unpack(mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `pack` for a tensor of `shape` [N, C, H, W]."""
    n, c, h, w = shape
    bits = (mask[:, :, None] >> torch.arange(8, device=mask.device)) & 1
    return bits.flatten(1)[:, :c].view(n, h, w, c).permute(0, 3, 1, 2).bool()


def _reference_backward(
    dy, x, norm, residual, r_norm, mask, act, training
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if mask is not None:
        z = torch.where(unpack(mask, x.shape), 1.0, -1.0).to(x.dtype)
    else:
        z = _reference_output(x, norm, residual, r_norm, "identity")
    dr = dz = REFERENCE_BACKWARD[act](dy, z)
    dx, *dparams = reference_gradients(dz, x, norm, training)
    if r_norm is not None:
        dr, *more = reference_gradients(dz, residual, r_norm, training)
        dparams += more
    return dx, dr, torch.stack(dparams)


def _reference_output(x, norm, residual, r_norm, act) -> torch.Tensor:
    *channels, eps = norm
    options = {"residual": residual, "residual_norm": r_norm, "training": False, "eps": eps}
    return reference(x, *channels, act=act, **options)[0]


@torch.library.custom_op("lapis::bn_act", mutates_args=())
def _op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    residual: torch.Tensor | None,
    r_weight: torch.Tensor | None,
    r_bias: torch.Tensor | None,
    r_mean: torch.Tensor | None,
    r_var: torch.Tensor | None,
    act: str,
    training: bool,
    eps: float,
    r_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    norm, r_norm = _norms(weight, bias, mean, var, eps, r_weight, r_bias, r_mean, r_var, r_eps)
    if runs_triton(x):
        return forward(x, norm, residual, r_norm, act)
    y = _reference_output(x, norm, residual, r_norm, act)
    kept = keeps_mask(act, kind_of(residual, r_norm))
    return nhwc(y), pack(y > 0) if kept else x.new_empty(0, dtype=torch.uint8)


def _norms(
    weight, bias, mean, var, eps, r_weight, r_bias, r_mean, r_var, r_eps
) -> tuple[Norm, Norm | None]:
    r_norm = None if r_weight is None else Norm(r_weight, r_bias, r_mean, r_var, r_eps)
    return Norm(weight, bias, mean, var, eps), r_norm


@_op.register_fake
def _(
    x, weight, bias, mean, var, residual, r_weight, r_bias, r_mean, r_var, act, training, eps, r_eps
):
    return empty_outputs(x, kind_of(residual, r_weight), act)


@torch.library.custom_op("lapis::bn_act_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    residual: torch.Tensor | None,
    r_weight: torch.Tensor | None,
    r_bias: torch.Tensor | None,
    r_mean: torch.Tensor | None,
    r_var: torch.Tensor | None,
    mask: torch.Tensor,
    kind: str,
    act: str,
    training: bool,
    eps: float,
    r_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    norm, r_norm = _norms(weight, bias, mean, var, eps, r_weight, r_bias, r_mean, r_var, r_eps)
    launched = backward if runs_triton(x) else _reference_backward
    kept = mask if keeps_mask(act, kind) else None
    dx, dr, dparams = launched(dy, x, norm, residual, r_norm, kept, act, training)
    return nhwc(dx), nhwc(dr) if _has_own_gradient(kind, act) else x.new_empty(0), dparams


def _has_own_gradient(kind: str, act: str) -> bool:
    # that of a residual added to an identity is dy, which is at hand
    return kind == "norm" or (kind == "add" and act != "identity")


@_backward_op.register_fake
def _(
    dy, x, weight, bias, mean, var, residual, r_weight, r_bias, r_mean, r_var, mask, kind, act,
    training, eps, r_eps,
):  # fmt: skip
    dx = empty_nhwc(*x.shape, like=x)
    dr = empty_nhwc(*x.shape, like=x) if _has_own_gradient(kind, act) else x.new_empty(0)
    return dx, dr, x.new_empty((4 if kind == "norm" else 2, x.shape[1]), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.act, ctx.training, ctx.eps, ctx.r_eps = inputs
    ctx.kind = kind_of(tensors[5], tensors[6])
    if ctx.kind == "add" and ctx.act in MASK_ACTS:
        tensors[5] = None
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, dy, _):
    tensors = ctx.saved_tensors
    dx, dr, dparams = _backward_op(
        dy, *tensors, ctx.kind, ctx.act, ctx.training, ctx.eps, ctx.r_eps
    )
    weight, r_weight = tensors[1], tensors[6]
    dweight, dbias = dparams[:2].to(weight.dtype)
    r_dweight, r_dbias = (None, None) if r_weight is None else dparams[2:].to(r_weight.dtype)
    if ctx.kind == "none":
        dr = None
    elif ctx.kind == "add" and ctx.act == "identity":
        dr = dy
    return dx, dweight, dbias, None, None, dr, r_dweight, r_dbias, *(None,) * 6


_op.register_autograd(_differentiate, setup_context=_save)


def bn_act(
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
    """act(BatchNorm(x) [+ residual | + BatchNorm(residual)]) for x [N, C, H, W] in float32, bf16
    or fp16 and [C] parameters in float32 or the dtype of x.

    residual: [N, C, H, W] of x's dtype. residual_norm: (weight, bias, running_mean, running_var,
        eps): the residual is a downsample convolution's raw output, normalised here.
    stats, residual_stats: float32 (mean, biased variance) of x and of the residual where the
        convolution delivered them; only used in training.
    Returns (y, mean, var), with residual_norm (y, mean, var, r_mean, r_var): y channels-last, the
    batch statistics float32 [C] (zeros for an empty batch), or None when not training. Running
    statistics are only read, and in training not even that: updating them is the caller's.

    Raises ValueError for an unknown `act`, for a tensor of another shape, dtype or device, when
    training on a single value per channel, and when running statistics are missing.
    """
    norms, delivered = [Norm(weight, bias, running_mean, running_var, eps)], [stats]
    check_inputs(x, act, training)
    check_norm(x, norms[0], training, stats)
    if residual is not None:
        check(
            (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device),
            lambda: f"residual {describe(residual)} must be like x {describe(x)}",
        )
    if residual_norm is not None:
        check(residual is not None, lambda: "residual_norm needs a residual")
        norms.append(Norm(*residual_norm))
        delivered.append(residual_stats)
        check_norm(x, norms[1], training, residual_stats, "residual ")

    if not training:
        found = [(norm.mean, norm.var) for norm in norms]
    elif None not in delivered:
        found = delivered
    else:
        second = residual.detach() if len(norms) == 2 else None
        measured = batch_statistics(x.detach(), second).unbind(1)
        found = [given or tuple(pair) for given, pair in zip(delivered, measured, strict=True)]
    r_args, r_eps = (None,) * 4, eps
    if len(norms) == 2:
        r_args, r_eps = (*norms[1][:2], *found[1]), norms[1].eps
    y, _ = _op(x, weight, bias, *found[0], residual, *r_args, act, training, eps, r_eps)
    if not training:
        return y, *(None, None) * len(norms)
    return y, *(tensor for pair in found for tensor in pair)


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    def draw(*size):
        return torch.randn(size, generator=generator, device=generator.device)

    c = shape[1]
    return {
        "x": nhwc((2 * draw(*shape) + 0.5).to(device, dtype)).requires_grad_(),
        "weight": (1 + 0.2 * draw(c)).to(device).requires_grad_(),
        "bias": (0.2 * draw(c)).to(device).requires_grad_(),
        "running_mean": (0.5 + 0.1 * draw(c)).to(device),
        "running_var": (4 * (1 + 0.1 * draw(c)).abs()).to(device),
        "residual": nhwc(draw(*shape).to(device, dtype)).requires_grad_(),
    }


def _launch(x, weight, bias, running_mean, running_var, residual) -> None:
    norm = Norm(weight, bias, running_mean, running_var, 1e-5)
    statistics(x)
    statistics(x, residual)
    for r, r_norm in ((None, None), (residual, None), (residual, norm)):
        y, mask = forward(x, norm, r, r_norm, "relu")
        saved = (None, None, mask) if kind_of(r, r_norm) == "add" else (r, r_norm, None)
        for training in (True, False):
            backward(y, x, norm, *saved, "relu", training)
        sums(y, x, norm, "relu", *saved, dy2=y)
    for act in ("identity", "relu"):  # dz, or dy where act' is still to be taken
        apply(y, x, norm, torch.empty((3, x.shape[1]), device=x.device), act=act, more=y)
    many = torch.empty((2, FOLD_ABOVE + 1, x.shape[1]), device=x.device)
    coefficients(many, x.numel() // x.shape[1], norm)


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    # training, with a residual to add, statistics from this room
    n = float(torch.Size(shape).numel())
    return {
        "forward": Cost(9 * n, 4 * n * itemsize + n / 8),
        "backward": Cost(10 * n, 6 * n * itemsize + n / 8),
    }


SPEC = KernelSpec("bn_act", reference, bn_act, _make_inputs, _launch, _cost, STAGES)

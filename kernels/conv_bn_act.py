"""conv_bn_act: inference of convolution, BatchNorm, addition and activation in one kernel.

    y = act((conv(x) - mean)*s + b [+ residual]),   s = weight/sqrt(var + eps), b = bias

Traffic: x, W, y and the residual once each; BatchNorm, addition and activation cost only the
reading of the residual. The norm is applied to the float32 sums in the epilogue instead of being
folded into stored weights, which would go stale at the next load_state_dict. There is no backward.

Layouts: see `conv_gemm`. Where Triton cannot run the op is `reference`.
"""

import torch
import torch.nn.functional as F

from kernels.activation import REFERENCE, check_act
from kernels.bn_checks import Norm
from kernels.conv_gemm import (
    SITES,
    Tile,
    choose,
    conv_cost,
    convolve,
    empty_output,
    make_conv_inputs,
    prepared,
)
from kernels.launch import check, describe, nhwc, runs_triton
from kernels.spec import Cost, Inputs, KernelSpec, Shape


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    residual: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    act: str = "relu",
    eps: float = 1e-5,
) -> torch.Tensor:
    """act(batch_norm(conv(x)) + residual) in plain PyTorch; past the convolution in float32."""
    y = F.conv2d(x, weight, stride=stride, padding=padding)
    channels = (t.to(running_var.dtype) for t in (running_mean, running_var, bn_weight, bn_bias))
    z = F.batch_norm(y.to(running_var.dtype), *channels, eps=eps)
    z = z if residual is None else z + residual
    return REFERENCE[act](z).to(x.dtype)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: Norm,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
    act: str,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Launch y = act(norm(conv(x)) + residual)."""
    y = empty_output(x, weight, stride, padding)
    k, rows = y.shape[1], y.numel() // y.shape[1]
    if rows:
        epilogue = {"norm": norm, "residual": residual, "act": act}
        convolve(x, weight, y, stride, padding, tile or choose(x, k, rows), **epilogue)
    return y


@torch.library.custom_op("lapis::conv_bn_act", mutates_args=())
def _op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
    act: str,
    eps: float,
) -> torch.Tensor:
    norm = Norm(bn_weight, bn_bias, running_mean, running_var, eps)
    if runs_triton(x):
        return forward(x, weight, norm, residual, stride, padding, act)
    return nhwc(reference(x, weight, *norm[:4], residual, stride, padding, act, eps))


@_op.register_fake
def _(
    x, weight, bn_weight, bn_bias, running_mean, running_var, residual, stride, padding, act, eps
):
    return empty_output(x, weight, stride, padding)


def _refuse(ctx, dy):
    raise RuntimeError(
        "conv_bn_act is for inference and has no gradient: use conv_stats and bn_act where one "
        "is needed, or torch.no_grad() where none is"
    )


_op.register_autograd(_refuse)


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    act: str = "relu",
    eps: float = 1e-5,
) -> torch.Tensor:
    """act(batch_norm(conv(x)) [+ residual]) for inference, rounded once: x [N, C, H, W], weight
    [K, C, R, S] cast to x's dtype, the norm's four [K] in float32 or x's dtype, residual
    [N, K, P, Q] of x's dtype; returns channels-last [N, K, P, Q].

    Raises ValueError as `conv_stats` does, and where the norm, residual or act do not fit;
    RuntimeError when a gradient is asked of the output.
    """
    x, weight = prepared(x, weight, stride, padding)
    check_act(act)
    norm = {"bn_weight": bn_weight, "bn_bias": bn_bias,
            "running_mean": running_mean, "running_var": running_var}  # fmt: skip
    for name, value in norm.items():
        check(
            (value.shape, value.device) == (weight.shape[:1], x.device)
            and value.dtype in (torch.float32, x.dtype),
            lambda name=name, value=value: (
                f"{name} {describe(value)} must be [{weight.shape[0]}] float32 or {x.dtype} "
                f"on {x.device}"
            ),
        )
    if residual is not None:
        expected = empty_output(x.detach().to("meta"), weight, stride, padding).shape
        check(
            (residual.shape, residual.dtype, residual.device) == (expected, x.dtype, x.device),
            lambda: (
                f"residual {describe(residual)} must be {tuple(expected)} {x.dtype} on {x.device}"
            ),
        )
    return _op(x, weight, *norm.values(), residual, stride, padding, act, eps)


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    inputs = make_conv_inputs(shape, dtype, device, generator)
    x, weight = (inputs[name].detach() for name in ("x", "weight"))
    y_shape = empty_output(x.to("meta"), weight, inputs["stride"], inputs["padding"]).shape

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device).to(device)

    k = y_shape[1]
    return {
        **inputs,
        "x": x,
        "weight": weight,
        "bn_weight": 1 + 0.3 * draw(k),
        "bn_bias": draw(k),
        "running_mean": draw(k),
        "running_var": 0.5 + draw(k) ** 2,
        "residual": nhwc(draw(*y_shape).to(dtype)),
    }


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
) -> None:
    norm = Norm(bn_weight, bn_bias, running_mean, running_var, 1e-5)
    forward(x, weight, norm, residual, stride, padding, "relu")


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    return conv_cost(shape, itemsize, residual=True)


SPEC = KernelSpec("conv_bn_act", reference, conv_bn_act, _make_inputs, _launch, _cost, SITES)

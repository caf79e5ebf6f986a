"""conv_bn_act: inference of convolution, BatchNorm, addition and activation in one kernel.

    y = act(conv(x)*scale + shift [+ residual])

Traffic: x, W, y and the residual once each; BatchNorm, addition and activation cost only the
reading of the residual. scale and shift are applied to the float32 sums instead of being folded
into stored weights, which would go stale at the next load_state_dict. There is no backward.

Layouts: see `conv_gemm`. Where Triton cannot run the op is `reference`.
"""

import torch
import torch.nn.functional as F

from kernels.activation import ACTS, REFERENCE
from kernels.conv_gemm import (
    SITES,
    Tile,
    choose,
    conv_cost,
    convolve,
    describe,
    empty_output,
    make_conv_inputs,
    prepared,
)
from kernels.launch import check, nhwc, runs_triton
from kernels.spec import Cost, Inputs, KernelSpec, Shape


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    act: str = "relu",
) -> torch.Tensor:
    """act(conv(x)*scale + shift + residual) in plain PyTorch; past the convolution in float32."""
    y = F.conv2d(x, weight, stride=stride, padding=padding)
    z = y.to(scale.dtype) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    z = z if residual is None else z + residual
    return REFERENCE[act](z).to(x.dtype)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
    act: str,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Launch y = act(conv(x)*scale + shift + residual)."""
    y = empty_output(x, weight, stride, padding)
    k, rows = y.shape[1], y.numel() // y.shape[1]
    if rows:
        addend = y if residual is None else nhwc(residual)
        epilogue = (y, scale.contiguous(), shift.contiguous(), addend)
        flags = {"STATS": False, "HAS_RESIDUAL": residual is not None, "ACT": act}
        convolve(x, weight, y, stride, padding, tile or choose(x, k, rows), epilogue, **flags)
    return y


@torch.library.custom_op("lapis::conv_bn_act", mutates_args=())
def _op(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
    act: str,
) -> torch.Tensor:
    if runs_triton(x):
        return forward(x, weight, scale, shift, residual, stride, padding, act)
    return nhwc(reference(x, weight, scale, shift, residual, stride, padding, act))


@_op.register_fake
def _(x, weight, scale, shift, residual, stride: int, padding: int, act: str):
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
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    act: str = "relu",
) -> torch.Tensor:
    """act(conv(x)*scale + shift [+ residual]) for inference, rounded once: x [N, C, H, W], weight
    [K, C, R, S] cast to x's dtype, scale and shift float32 [K] (see `fold_scale_shift`), residual
    [N, K, P, Q] of x's dtype; returns channels-last [N, K, P, Q].

    Raises ValueError as `conv_stats` does, and where scale, shift, residual or act do not fit;
    RuntimeError when a gradient is asked of the output.
    """
    x, weight = prepared(x, weight, stride, padding)
    check(act in ACTS, lambda: f"act must be one of {', '.join(ACTS)}, not {act!r}")
    for name, value in (("scale", scale), ("shift", shift)):
        check(
            (value.shape, value.dtype, value.device) == (weight.shape[:1], torch.float32, x.device),
            lambda name=name, value=value: (
                f"{name} {describe(value)} must be [{weight.shape[0]}] float32 on {x.device}"
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
    return _op(x, weight, scale, shift, residual, stride, padding, act)


def fold_scale_shift(
    weight_bn: torch.Tensor | None,
    bias_bn: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """BatchNorm with running statistics as scale*y + shift, float32 [K]: scale = gamma/sqrt(var +
    eps), shift = beta - mean*scale; gamma and beta are None without affine parameters."""
    scale = torch.rsqrt(running_var.detach().float() + eps)
    if weight_bn is not None:
        scale = scale * weight_bn.detach().float()
    shift = -running_mean.detach().float() * scale
    return scale, shift if bias_bn is None else shift + bias_bn.detach().float()


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    inputs = make_conv_inputs(shape, dtype, device, generator)
    x, weight = (inputs[name].detach() for name in ("x", "weight"))
    y_shape = empty_output(x.to("meta"), weight, inputs["stride"], inputs["padding"]).shape

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device).to(device)

    scale, shift = draw(y_shape[1]), draw(y_shape[1])
    residual = nhwc(draw(*y_shape).to(dtype))
    return {**inputs, "x": x, "weight": weight, "scale": scale, "shift": shift,
            "residual": residual}  # fmt: skip


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
) -> None:
    forward(x, weight, scale, shift, residual, stride, padding, "relu")


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    return conv_cost(shape, itemsize, residual=True)


SPEC = KernelSpec("conv_bn_act", reference, conv_bn_act, _make_inputs, _launch, _cost, SITES)

"""avg_pool: global average pooling whose gradient stays channels-last.

    forward    y[n, c] = sum_p x[n, c, p] / P        p over the P = H * W pixels
    backward   dx[n, c, p] = dy[n, c] / P

Traffic, in tensors of N*C*P elements: forward reads 1, as PyTorch does. Backward writes 1 in one
launch; PyTorch divides an expanded view, which comes out NCHW, and the layer before copies it to
channels-last: 2 launches, 2 written and 1 read.

Layout: x [N, C, H, W], any strides (one that is not channels-last is copied once); y and dy
[N, C], dy of any strides (`sum` sends strides of 0). Sums are float32 in a fixed order. Where
Triton cannot run the op is `reference`.
"""

import torch

from kernels.launch import cdiv, check, check_image, empty_nhwc, nhwc, run, runs_triton, tl, triton
from kernels.numerics import rounded
from kernels.shapes import STAGES
from kernels.spec import Cost, Inputs, KernelSpec, Shape

BLOCK_C, BLOCK_P = 64, 64  # a tile of 128-byte rows in bf16; 7x7 pixels are one tile


def reference(x: torch.Tensor) -> torch.Tensor:
    """Mean over height and width: [N, C, H, W] -> [N, C]."""
    return x.mean(dim=(2, 3))


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, channels, pixels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # grid (N, C / BLOCK_C); x [N, P, C], y [N, C]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += tl.program_id(0).to(tl.int64) * pixels * channels
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, pixels, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < channels)[None, :]
        x = tl.load(x_ptr + p[:, None] * channels + c[None, :], mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float32), axis=0)
    y = rounded(total / pixels, y_ptr.dtype.element_ty)
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * channels + c, y, mask=c < channels)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dx_ptr,
    stride_dn,
    stride_dc,
    channels,
    pixels,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # grid (N, C / BLOCK_C); dy [N, C] by its strides, dx [N, P, C]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(0).to(tl.int64)
    dy = tl.load(dy_ptr + n * stride_dn + c * stride_dc, mask=c < channels)
    dx = rounded(dy.to(tl.float32) / pixels, dx_ptr.dtype.element_ty)
    dx_ptr += n * pixels * channels
    for start in range(0, pixels, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < channels)[None, :]
        block = tl.broadcast_to(dx[None, :], (BLOCK_P, BLOCK_C))
        tl.store(dx_ptr + p[:, None] * channels + c[None, :], block, mask=inside)


def forward(x: torch.Tensor) -> torch.Tensor:
    """Launch the mean over height and width; x [N, C, H, W] -> [N, C]."""
    x = nhwc(x)
    n, c, h, w = x.shape
    y = x.new_empty(n, c)
    if y.numel():
        grid = (n, cdiv(c, BLOCK_C))
        run(_forward_kernel, grid, x, y, c, h * w, BLOCK_C=BLOCK_C, BLOCK_P=BLOCK_P)
    return y


def backward(dy: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Launch dx = dy / P; dy [N, C] of any strides, dx channels-last."""
    n, c = dy.shape
    dx = empty_nhwc(n, c, height, width, like=dy)
    if dx.numel():
        grid = (n, cdiv(c, BLOCK_C))
        args = (dy, dx, *dy.stride(), c, height * width)
        run(_backward_kernel, grid, *args, BLOCK_C=BLOCK_C, BLOCK_P=BLOCK_P)
    return dx


@torch.library.custom_op("lapis::avg_pool", mutates_args=())
def _op(x: torch.Tensor) -> torch.Tensor:
    return forward(x) if runs_triton(x) else reference(x)


@_op.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:2])


@torch.library.custom_op("lapis::avg_pool_backward", mutates_args=())
def _backward_op(dy: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if runs_triton(dy):
        return backward(dy, height, width)
    return nhwc((dy / (height * width))[:, :, None, None].expand(-1, -1, height, width)).clone()


@_backward_op.register_fake
def _(dy: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return empty_nhwc(*dy.shape, height, width, like=dy)


def _save(ctx, inputs, output) -> None:
    ctx.size = inputs[0].shape[2:]


_op.register_autograd(lambda ctx, dy: _backward_op(dy, *ctx.size), setup_context=_save)


def avg_pool(x: torch.Tensor) -> torch.Tensor:
    """Mean over height and width: x [N, C, H, W] with at least one pixel -> [N, C], same dtype.

    Raises ValueError for another number of dimensions or no pixels.
    """
    check_image("x", x)
    check(x.shape[2] * x.shape[3] > 0, lambda: f"x {tuple(x.shape)} has no pixels to average")
    return _op(x)


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    x = torch.randn(shape, generator=generator, device=generator.device)
    return {"x": nhwc(x.to(device, dtype)).requires_grad_()}


def _launch(x: torch.Tensor) -> None:
    backward(forward(x), *x.shape[2:])


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    n, c, h, w = shape
    cost = Cost(float(n * c * h * w), float(n * c * (h * w + 1) * itemsize))
    return {"forward": cost, "backward": cost}


SPEC = KernelSpec("avg_pool", reference, avg_pool, _make_inputs, _launch, _cost, STAGES[-1:])

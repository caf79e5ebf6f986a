"""add_relu: the residual addition and its activation in one pass.

    forward    y = act(a + b)
    backward   da = db = dy * act'(a + b)

Traffic, in tensors of N*H*W*C elements: forward reads 2, writes 1 (eager: reads 3, writes 2).
Backward of relu and leaky_relu reads 2 (dy and y, whose sign is that of a + b) and writes 1, which
is the gradient of both inputs; the smooth activations read a, b and dy.

Layout: a and b [N, C, H, W] of one shape and dtype, any strides; tensors that are not
channels-last are copied once. Where Triton cannot run the op is `reference`. a + b is rounded to
the storage type before the activation, as in eager PyTorch.
"""

import torch

from kernels.activation import (
    MASK_ACTS,
    REFERENCE,
    REFERENCE_BACKWARD,
    activate,
    activate_grad,
    check_act,
)
from kernels.launch import (
    cdiv,
    check,
    check_image,
    describe,
    empty_nhwc,
    nhwc,
    run,
    runs_triton,
    tl,
    triton,
)
from kernels.numerics import rounded
from kernels.shapes import STAGES
from kernels.spec import Cost, Inputs, KernelSpec, Shape

BLOCK = 2048  # 16 bytes a thread at 4 warps for bf16, twice over


def reference(a: torch.Tensor, b: torch.Tensor, act: str = "relu") -> torch.Tensor:
    """act(a + b) in plain PyTorch, any shape and dtype."""
    return REFERENCE[act](a + b)


@triton.jit
def _forward_kernel(a_ptr, b_ptr, y_ptr, numel, ACT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    a = tl.load(a_ptr + offsets, mask=inside).to(tl.float32)
    b = tl.load(b_ptr + offsets, mask=inside).to(tl.float32)
    z = rounded(a + b, y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + offsets, rounded(activate(z, ACT), y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dy_ptr, a_ptr, b_ptr, dz_ptr, numel, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """Without b, a stands for y: its sign is that of a + b."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    z = tl.load(a_ptr + offsets, mask=inside).to(tl.float32)
    if b_ptr is not None:
        z += tl.load(b_ptr + offsets, mask=inside).to(tl.float32)
        z = rounded(z, dz_ptr.dtype.element_ty).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=inside).to(tl.float32)
    dz = rounded(dy * activate_grad(z, ACT), dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + offsets, dz, mask=inside)


def forward(a: torch.Tensor, b: torch.Tensor, act: str) -> torch.Tensor:
    """Launch y = act(a + b); returns y [N, C, H, W], channels-last."""
    a, b = nhwc(a), nhwc(b)
    y = empty_nhwc(*a.shape, like=a)
    if y.numel():
        grid = (cdiv(y.numel(), BLOCK),)
        run(_forward_kernel, grid, a, b, y, y.numel(), ACT=act, BLOCK=BLOCK)
    return y


def backward(dy: torch.Tensor, a: torch.Tensor, b: torch.Tensor | None, act: str) -> torch.Tensor:
    """Launch dz = dy * act'(a + b); for the MASK_ACTS a may be the output y, and b None."""
    dy, a = nhwc(dy), nhwc(a)
    b = None if b is None else nhwc(b)
    dz = empty_nhwc(*a.shape, like=a)
    if dz.numel():
        grid = (cdiv(dz.numel(), BLOCK),)
        run(_backward_kernel, grid, dy, a, b, dz, dz.numel(), ACT=act, BLOCK=BLOCK)
    return dz


@torch.library.custom_op("lapis::add_relu", mutates_args=())
def _op(a: torch.Tensor, b: torch.Tensor, act: str) -> torch.Tensor:
    return forward(a, b, act) if runs_triton(a) else nhwc(reference(a, b, act))


@_op.register_fake
def _(a, b, act):
    return empty_nhwc(*a.shape, like=a)


@torch.library.custom_op("lapis::add_relu_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor, a: torch.Tensor, b: torch.Tensor | None, act: str
) -> torch.Tensor:
    if runs_triton(dy):
        return backward(dy, a, b, act)
    dz = REFERENCE_BACKWARD[act](dy, a if b is None else a + b)
    return nhwc(dz).clone()  # identity's is dy, and an op may not return its input


@_backward_op.register_fake
def _(dy, a, b, act):
    return empty_nhwc(*a.shape, like=a)


def _save(ctx, inputs, output) -> None:
    a, b, ctx.act = inputs
    ctx.save_for_backward(*((output, None) if ctx.act in MASK_ACTS else (a, b)))


def _differentiate(ctx, dy):
    dz = _backward_op(dy, *ctx.saved_tensors, ctx.act)
    return dz, dz, None


_op.register_autograd(_differentiate, setup_context=_save)


def add_relu(a: torch.Tensor, b: torch.Tensor, act: str = "relu") -> torch.Tensor:
    """act(a + b) for a, b [N, C, H, W] of one shape, dtype and device; returns channels-last [N,
    C, H, W].

    Raises ValueError when the shapes, dtypes or devices differ, the tensors are not 4-D, not in
    float32, bfloat16 or float16, or `act` is unknown.
    """
    check_act(act)
    check_image("a", a)
    check(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device),
        lambda: f"a {describe(a)} and b {describe(b)} must be alike",
    )
    return _op(a, b, act)


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    def draw():
        x = torch.randn(shape, generator=generator, device=generator.device)
        return nhwc(x.to(device, dtype)).requires_grad_()

    return {"a": draw(), "b": draw()}


def _launch(a: torch.Tensor, b: torch.Tensor) -> None:
    for act in ("relu", "silu"):
        y = forward(a, b, act)
        backward(y, *((y, None) if act in MASK_ACTS else (a, b)), act)


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    n = float(torch.Size(shape).numel())
    return {"forward": Cost(2 * n, 3 * n * itemsize), "backward": Cost(n, 3 * n * itemsize)}


SPEC = KernelSpec("add_relu", reference, add_relu, _make_inputs, _launch, _cost, STAGES)

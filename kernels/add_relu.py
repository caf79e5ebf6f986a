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

from kernels.activation import ACTS, MASK_ACTS, REFERENCE, activate, activate_grad
from kernels.launch import cdiv, check, empty_nhwc, nhwc, run, runs_triton, tl, triton
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
def _backward_kernel(
    dy_ptr, a_ptr, b_ptr, dz_ptr, numel, ACT: tl.constexpr, HAS_B: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    z = tl.load(a_ptr + offsets, mask=inside).to(tl.float32)
    if HAS_B:
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


def backward(
    dy: torch.Tensor, z: torch.Tensor, addend: torch.Tensor | None, act: str
) -> torch.Tensor:
    """Launch dz = dy * act'(z + addend); z is the output y where `act` is a mask activation and
    addend is None."""
    dy, z = nhwc(dy), nhwc(z)
    addend = None if addend is None else nhwc(addend)
    dz = empty_nhwc(*z.shape, like=z)
    if dz.numel():
        grid = (cdiv(dz.numel(), BLOCK),)
        has_b = addend is not None
        args = (dy, z, addend if has_b else z, dz, dz.numel())
        run(_backward_kernel, grid, *args, ACT=act, HAS_B=has_b, BLOCK=BLOCK)
    return dz


@torch.library.custom_op("lapis::add_relu", mutates_args=())
def _op(a: torch.Tensor, b: torch.Tensor, act: str) -> torch.Tensor:
    return forward(a, b, act) if runs_triton(a) else nhwc(reference(a, b, act)).clone()


@_op.register_fake
def _(a: torch.Tensor, b: torch.Tensor, act: str) -> torch.Tensor:
    return empty_nhwc(*a.shape, like=a)


@torch.library.custom_op("lapis::add_relu_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor, z: torch.Tensor, addend: torch.Tensor | None, act: str
) -> torch.Tensor:
    if runs_triton(dy):
        return backward(dy, z, addend, act)
    # vjp, because an op's implementation runs below autograd
    _, pullback = torch.func.vjp(REFERENCE[act], z if addend is None else z + addend)
    (dz,) = pullback(dy.to(z.dtype))
    return nhwc(dz).clone()


@_backward_op.register_fake
def _(dy: torch.Tensor, z: torch.Tensor, addend: torch.Tensor | None, act: str) -> torch.Tensor:
    return empty_nhwc(*z.shape, like=z)


def _save(ctx, inputs, output) -> None:
    a, b, ctx.act = inputs
    ctx.save_for_backward(*((output,) if ctx.act in MASK_ACTS else (a, b)))


def _differentiate(ctx, dy):
    z, addend = (*ctx.saved_tensors, None)[:2]
    dz = _backward_op(dy, z, addend, ctx.act)
    return dz, dz, None


_op.register_autograd(_differentiate, setup_context=_save)


def add_relu(a: torch.Tensor, b: torch.Tensor, act: str = "relu") -> torch.Tensor:
    """act(a + b) for a, b [N, C, H, W] of one shape, dtype and device; returns channels-last [N,
    C, H, W].

    Raises ValueError when the shapes, dtypes or devices differ, the tensors are not 4-D, or `act`
    is unknown.
    """
    check(act in ACTS, lambda: f"act must be one of {', '.join(ACTS)}, not {act!r}")
    check(a.dim() == 4, lambda: f"a must be [N, C, H, W], not {tuple(a.shape)}")
    check(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device),
        lambda: f"a {_describe(a)} and b {_describe(b)} must be alike",
    )
    return _op(a, b, act)


def _describe(x: torch.Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    def draw():
        x = torch.randn(shape, generator=generator, device=generator.device)
        return nhwc(x.to(device, dtype)).requires_grad_()

    return {"a": draw(), "b": draw()}


def _launch(a: torch.Tensor, b: torch.Tensor) -> None:
    y = forward(a, b, "relu")
    backward(y, y, None, "relu")


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    n = float(torch.Size(shape).numel())
    return {"forward": Cost(2 * n, 3 * n * itemsize), "backward": Cost(n, 3 * n * itemsize)}


SPEC = KernelSpec("add_relu", reference, add_relu, _make_inputs, _launch, _cost, STAGES)

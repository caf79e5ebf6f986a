"""weight_update: one step of SGD or AdamW over all weights that also writes their 16-bit copies.

    SGD      g' = g + decay*w;  b = momentum*b + g';  w -= rate * (g' + momentum*b | b | g')
             for Nesterov, for momentum, without momentum                  (Sutskever et al. 2013)
    AdamW    w -= rate*decay*w;  m = b1*m + (1 - b1)*g;  v = b2*v + (1 - b2)*g^2
             w -= rate/(1 - b1^t) * m / (sqrt(v)/sqrt(1 - b2^t) + eps)  (Loshchilov, Hutter 2019)
    copy     w rounded to 16 bits

The rules are those of torch.optim with `fused=True`: the rate, and `skip`, which makes the step a
no-op where it is 1, are read on the device. Everything else is a constant of the program.

Traffic, bytes a weight: SGD with momentum reads 12 and writes 8, the copy 2 more. A cast of the
weights before the forward reads 4 of them once again: 85 MB for ResNet-34. One launch takes TENSORS
tensors; a program finds its own among the pointers it is given. These are arguments, not a table in
memory, so a CUDA graph holds the addresses of its own gradients.

Layout: float32 weights, each dense in some order of its axes; slots, copy and gradient lie in
memory as the weight does (a gradient that does not is copied once). There is no gradient, and no
operator: the update is in place. Where Triton cannot run it is `torch._fused_sgd_` and
`torch._fused_adamw_`, the reference, and a cast.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from kernels.launch import cdiv, check, describe, run, runs_triton, tl, triton
from kernels.numerics import rounded
from kernels.shapes import RESNET34
from kernels.spec import Cost, Inputs, KernelSpec, Shape

BLOCK = 2048
TENSORS = 40  # a launch: their pointers stay far under the 4 KB that a kernel's arguments may take
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch.optim.AdamW's

Tensors = Sequence[Tensor]


def reference_sgd(
    weights: Tensors, gradients: Tensors, momenta: Tensors, copies: Tensors,
    rate: Tensor, skip: Tensor, *, weight_decay: float, momentum: float, nesterov: bool,
) -> None:  # fmt: skip
    """What `sgd_` does, by PyTorch's own kernel and a cast."""
    torch._fused_sgd_(
        weights, gradients, momenta, lr=rate, found_inf=skip, weight_decay=weight_decay,
        momentum=momentum, nesterov=nesterov, dampening=0.0, maximize=False, is_first_step=False,
    )  # fmt: skip
    if copies:
        torch._foreach_copy_(copies, weights)


def reference_adamw(
    weights: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, steps: Tensors,
    copies: Tensors, rate: Tensor, skip: Tensor, *, weight_decay: float,
) -> None:  # fmt: skip
    """What `adamw_` does after it has moved `steps` on, by PyTorch's own kernel and a cast."""
    torch._fused_adamw_(
        weights, gradients, means, squares, [], steps, lr=rate, found_inf=skip, beta1=BETA1,
        beta2=BETA2, eps=EPS, weight_decay=weight_decay, amsgrad=False, maximize=False,
    )  # fmt: skip
    if copies:
        torch._foreach_copy_(copies, weights)


@triton.jit
def _pick(given, which):
    """given[which], of a tuple that the compiler knows the members of."""
    chosen = given[0]
    for i in tl.static_range(1, len(given)):
        chosen = tl.where(which == i, given[i], chosen)
    return chosen


@triton.jit
def _place(lasts, numels, skip_ptr, BLOCK: tl.constexpr):
    """The number of this program's tensor, the elements it takes of it, and which of them are
    there: none where the step is skipped. lasts: the programs up to the end of each tensor."""
    program = tl.program_id(0)
    which = 0
    first = 0
    for i in tl.static_range(len(lasts) - 1):
        after = program >= lasts[i]
        which = tl.where(after, i + 1, which)
        first = tl.where(after, lasts[i], first)
    at = (program - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numel = tl.where(tl.load(skip_ptr) == 1, 0, _pick(numels, which))
    return which, at, at < numel


@triton.jit
def _store(weights, copies, which, at, inside, w):
    tl.store(_pick(weights, which) + at, w, mask=inside)
    if copies is not None:
        copy_ptr = _pick(copies, which)
        tl.store(copy_ptr + at, rounded(w, copy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sgd_kernel(
    weights, gradients, momenta, copies, lasts, numels, rate_ptr, skip_ptr,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    which, at, inside = _place(lasts, numels, skip_ptr, BLOCK)
    w = tl.load(_pick(weights, which) + at, mask=inside)
    g = tl.load(_pick(gradients, which) + at, mask=inside)
    if DECAY != 0:
        g += DECAY * w
    if momenta is not None:
        momentum_ptr = _pick(momenta, which) + at
        b = MOMENTUM * tl.load(momentum_ptr, mask=inside) + g
        tl.store(momentum_ptr, b, mask=inside)
        g = g + MOMENTUM * b if NESTEROV else b
    _store(weights, copies, which, at, inside, w - tl.load(rate_ptr) * g)


@triton.jit
def _adamw_kernel(
    weights, gradients, means, squares, steps, copies, lasts, numels, rate_ptr, skip_ptr,
    DECAY: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, EPS: tl.constexpr,
    LOG_B1: tl.constexpr, LOG_B2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    which, at, inside = _place(lasts, numels, skip_ptr, BLOCK)
    rate = tl.load(rate_ptr)
    # t counts this step already; in float32 its 1 - beta^t would lose four digits at first
    t = tl.load(_pick(steps, which)).to(tl.float64)
    size = (rate / (1.0 - tl.exp(t * LOG_B1))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp(t * LOG_B2)).to(tl.float32)
    w = tl.load(_pick(weights, which) + at, mask=inside)
    g = tl.load(_pick(gradients, which) + at, mask=inside)
    mean_ptr = _pick(means, which) + at
    square_ptr = _pick(squares, which) + at
    w -= rate * DECAY * w
    m = B1 * tl.load(mean_ptr, mask=inside) + (1 - B1) * g
    v = B2 * tl.load(square_ptr, mask=inside) + (1 - B2) * g * g
    tl.store(mean_ptr, m, mask=inside)
    tl.store(square_ptr, v, mask=inside)
    _store(weights, copies, which, at, inside, w - size * m / (tl.sqrt(v) / root + EPS))


def _launch_all(
    kernel, columns: Sequence[Tensors], rate: Tensor, skip: Tensor, **constants
) -> None:
    """Launch `kernel` over the rows of `columns`, the weights first; a column without tensors is
    given as None."""
    weights = columns[0]
    filled = [i for i, weight in enumerate(weights) if weight.numel()]
    for start in range(0, len(filled), TENSORS):
        rows = filled[start : start + TENSORS]
        given = [tuple(column[i] for i in rows) if column else None for column in columns]
        numels = tuple(weights[i].numel() for i in rows)
        lasts = tuple(accumulate(cdiv(numel, BLOCK) for numel in numels))
        run(kernel, lasts[-1:], *given, lasts, numels, rate, skip, **constants, BLOCK=BLOCK)


def launch_sgd(
    weights: Tensors, gradients: Tensors, momenta: Tensors, copies: Tensors,
    rate: Tensor, skip: Tensor, *, weight_decay: float, momentum: float, nesterov: bool,
) -> None:  # fmt: skip
    """Launch what `sgd_` does."""
    constants = {"DECAY": weight_decay, "MOMENTUM": momentum, "NESTEROV": nesterov}
    _launch_all(_sgd_kernel, (weights, gradients, momenta, copies), rate, skip, **constants)


def launch_adamw(
    weights: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, steps: Tensors,
    copies: Tensors, rate: Tensor, skip: Tensor, *, weight_decay: float,
) -> None:  # fmt: skip
    """Launch what `adamw_` does after it has moved `steps` on."""
    columns = (weights, gradients, means, squares, steps, copies)
    constants = {"DECAY": weight_decay, "B1": BETA1, "B2": BETA2, "EPS": EPS}
    logarithms = {"LOG_B1": math.log(BETA1), "LOG_B2": math.log(BETA2)}
    _launch_all(_adamw_kernel, columns, rate, skip, **constants, **logarithms)


@torch.no_grad()
def sgd_(
    weights: Tensors,
    gradients: Tensors,
    momenta: Tensors,
    copies: Tensors,
    rate: Tensor,
    skip: Tensor,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> None:
    """One step of SGD in place at the learning rate `rate`, float32 []; none where `skip`, float32
    [], is 1.

    weights: float32. gradients: one for each. momenta: zeros like the weights at first; empty
    without momentum. copies: empty, or like the weights in 16 bits; they become what the weights
    round to. Raises ValueError for other types, shapes and layouts.
    """
    if not weights:
        return
    slots = [momenta] if momentum else []
    gradients = _checked(weights, gradients, slots, copies)
    update = launch_sgd if runs_triton(rate) else reference_sgd
    options = {"weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
    update(weights, gradients, momenta if momentum else [], copies, rate, skip, **options)
    _count(weights, *slots, copies)


@torch.no_grad()
def adamw_(
    weights: Tensors,
    gradients: Tensors,
    means: Tensors,
    squares: Tensors,
    steps: Tensors,
    copies: Tensors,
    rate: Tensor,
    skip: Tensor,
    *,
    weight_decay: float = 0.0,
) -> None:
    """One step of AdamW in place, as `sgd_` for SGD.

    means, squares: zeros like the weights at first. steps: float32 [] for each weight, how many
    steps it has made.
    """
    if not weights:
        return
    gradients = _checked(weights, gradients, [means, squares], copies)
    torch._foreach_add_(steps, 1 - skip)
    update = launch_adamw if runs_triton(rate) else reference_adamw
    slots = (means, squares, steps)
    update(weights, gradients, *slots, copies, rate, skip, weight_decay=weight_decay)
    _count(weights, means, squares, copies)


def _checked(
    weights: Tensors, gradients: Tensors, slots: list[Tensors], copies: Tensors
) -> Tensors:
    """The gradients, each in the layout of its weight. Raises ValueError."""
    narrow = (torch.bfloat16, torch.float16)
    for column in [weights, gradients, *slots, *([copies] if copies else [])]:
        for weight, tensor in zip(weights, column, strict=True):
            check(
                tensor.dtype in (narrow if column is copies else (torch.float32,))
                and (tensor.shape, tensor.device) == (weight.shape, weight.device),
                lambda weight=weight, tensor=tensor: (
                    "weights, gradients and slots must be float32 and copies 16-bit, alike in "
                    f"shape and device: not {describe(tensor)} for {describe(weight)}"
                ),
            )
            check(
                column is gradients or (_dense(weight) and _same_layout(weight, tensor)),
                lambda weight=weight, tensor=tensor: (
                    "weights must be dense, slots and copies laid out as they are: not strides "
                    f"{tensor.stride()} for the weight {describe(weight)} of {weight.stride()}"
                ),
            )
    return [
        gradient if _same_layout(weight, gradient) else torch.empty_like(weight).copy_(gradient)
        for weight, gradient in zip(weights, gradients, strict=True)
    ]


def _dense(x: Tensor) -> bool:
    layouts = [torch.contiguous_format, *([torch.channels_last] if x.dim() == 4 else [])]
    return any(x.is_contiguous(memory_format=layout) for layout in layouts)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape lie in memory alike; the stride of an axis of 1 says nothing."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in strides)


def _count(*columns: Tensors) -> None:
    """Tell autograd, and whoever keeps what follows from these tensors, that they have changed."""
    torch.autograd.graph.increment_version([tensor for column in columns for tensor in column])


def _on_flat(
    update: Callable[..., None],
    weights: Tensor,
    gradients: Tensor,
    momenta: Tensor,
    copies: Tensor,
    sizes: list[int],
    **others,
) -> Tensor:
    """SGD over the parts of flat tensors; returns the copies."""
    update(*(flat.split(sizes) for flat in (weights, gradients, momenta, copies)), **others)
    return copies


def _sizes(classes: int) -> list[int]:
    sizes = [site.k * site.c * site.r**2 for site in RESNET34 for _ in range(site.count)]
    return [*sizes, RESNET34[-1].k * classes]


def _make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    sizes = _sizes(shape[1])
    size = (4, sum(sizes))
    drawn = torch.randn(size, generator=generator, device=generator.device).to(device)
    flat = dict(zip(("weights", "gradients", "momenta", "copies"), drawn.unbind(), strict=True))
    scalars = {"rate": torch.ones((), device=device), "skip": torch.zeros((), device=device)}
    sgd = {"weight_decay": 5e-4, "momentum": 0.9, "nesterov": True}
    return {**flat, "copies": flat["copies"].to(dtype), "sizes": sizes, **scalars, **sgd}


def _launch(weights, gradients, momenta, copies, sizes, rate, skip, **sgd) -> None:
    w, g, m, c = (flat.split(sizes) for flat in (weights, gradients, momenta, copies))
    for some in (c, []):
        launch_sgd(w, g, m, some, rate, skip, **sgd)
        launch_adamw(w, g, m, m, [rate] * len(w), some, rate, skip, weight_decay=5e-4)


def _cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    weights = float(sum(_sizes(shape[1])))
    return {"forward": Cost(6.0 * weights, weights * (12 + 8 + itemsize))}


# (batch, classes): SGD over the filters of ResNet-34, once a batch
SPEC = KernelSpec(
    "weight_update", partial(_on_flat, reference_sgd), partial(_on_flat, sgd_), _make_inputs,
    _launch, _cost, ((32, 5),),
)  # fmt: skip

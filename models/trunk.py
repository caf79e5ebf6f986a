"""The trunk of a network as one autograd function: explicit launches, forward and backward.

A block is a chain of units  x = conv(h),  z = norm(x),  h' = act(z); the last adds the shortcut to
z: the block's input h, or r_norm(conv_r(h)). Backward, unit by unit from the last, with dz the
gradient of z and the equations of `kernels/bn_act.py`:

    S1, S2  = sum dz, sum dz*(x - mean)                 -> dweight, dbias of the norm; A, B, C
    dx      = A*dz + B*(x - mean) + C
    dW      = dx^T * im2col(h)
    dz_before = (conv_transpose(dx, W) [+ fork]) * act'(z_before)

fork is what reaches the block's input over the shortcut: the block's own dz, or the data gradient
of the shortcut's convolution. Since a block ends with dz_before and its sums, one function spans
all blocks: what a block's first convolution hands back is masked and summed for the block before.

A plan says who does what; it is data. What is saved for the backward follows from it: the block's
input, the raw output of every convolution, one bit an element where an identity was added, and,
unless a prologue makes them again, the activations between the convolutions. Nothing twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import bn_passes, bn_stats, bn_sums
from kernels.bn_checks import Norm
from kernels.conv_dgrad import Before, data_gradient
from kernels.conv_prologue import Gradient, Normed, stored_h
from kernels.conv_stats import forward as convolve_with_statistics
from kernels.conv_wgrad import weight_gradient
from kernels.launch import nhwc

aten = torch.ops.aten


@dataclass(frozen=True)
class Plan:
    """Who computes the convolutions of a block: the library (cuDNN), followed by our passes over
    memory, or our kernels, which do the work of those passes in their epilogues.

    forward: ours delivers the statistics. dgrad: ours adds the fork, takes act' and sums. wgrad:
    ours writes float32. prologue: ours also apply norm and activation, and BatchNorm's backward,
    while they load; needs all three.
    """

    name: str
    forward: bool = False
    dgrad: bool = False
    wgrad: bool = False
    prologue: bool = False


PLANS = {
    plan.name: plan
    for plan in (
        Plan("P1"),
        Plan("P1+statistics", forward=True),
        Plan("P3", forward=True, dgrad=True, wgrad=True),
        Plan("P3-wgrad", forward=True, dgrad=True),
        Plan("P4", forward=True, dgrad=True, wgrad=True, prologue=True),
    )
}


class Conv(NamedTuple):
    """A convolution without bias and the BatchNorm after it: weight [K, C, R, S] in the type of the
    activations, gamma and beta [K]."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    stride: int
    padding: int
    eps: float


class Block(NamedTuple):
    """convs with their acts, one after another; `shortcut` is the convolution of the residual,
    `adds` whether there is a residual at all."""

    plan: Plan
    convs: tuple[Conv, ...]
    acts: tuple[str, ...]
    shortcut: Conv | None
    adds: bool


class Unit(NamedTuple):
    """What the backward needs of one unit: h, what its convolution read (stored, or made on load),
    and how it went on from there: the raw x, the norm over the batch's statistics and act; at the
    end of a block also the residual, or the mask where that says enough."""

    h: Tensor | Normed
    made: Before


class Arriving(NamedTuple):
    """The gradient that reaches a unit: of z, where `act` is identity, else of act(z), with act'
    still to be taken; and the partial sums of dz."""

    gradient: Tensor
    act: str
    partials: Tensor


def forward_block(block: Block, h: Tensor) -> tuple[Tensor, list[Unit]]:
    """The launches of one block: h [N, C, H, W] -> out, and what the backward needs."""
    units, given = [], h
    for conv, act in zip(block.convs[:-1], block.acts[:-1], strict=True):
        x, norm = _convolve(block.plan, given, conv)
        units.append(Unit(given, Before(x, norm, act)))
        given = Normed(x, norm, act) if block.plan.prologue else _activate(x, norm, act)
    x, norm = _convolve(block.plan, given, block.convs[-1])
    r, r_norm, act = (h if block.adds else None), None, block.acts[-1]
    if block.shortcut is not None:
        r, r_norm = _convolve(block.plan, h, block.shortcut)
    out, mask = bn_passes.forward(x, norm, r, r_norm, act)
    if mask.numel():  # the bits say all that the backward asks of the residual
        units.append(Unit(given, Before(x, norm, act, mask=mask)))
    else:
        units.append(Unit(given, Before(x, norm, act, r, r_norm)))
    return out, units


def _convolve(plan: Plan, h: Tensor | Normed, conv: Conv) -> tuple[Tensor, Norm]:
    """The raw convolution and its BatchNorm over the batch's statistics."""
    if plan.forward:
        x, statistics = convolve_with_statistics(h, conv.weight, conv.stride, conv.padding)
    else:
        x = aten.convolution(h, conv.weight, None, *_geometry(conv))
        statistics = bn_stats.statistics(x)[:, 0]
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"batch statistics need more than one value per channel, got {tuple(x.shape)}; "
            "use larger batches or pictures"
        )
    return x, Norm(conv.gamma, conv.beta, statistics[0], statistics[1], conv.eps)


def _activate(x: Tensor, norm: Norm, act: str) -> Tensor:
    return bn_passes.forward(x, norm, None, None, act)[0]


def _geometry(conv: Conv) -> tuple:
    # stride, padding, dilation, transposed, output padding, groups
    return [conv.stride] * 2, [conv.padding] * 2, [1, 1], False, [0, 0], 1


def backward_block(
    block: Block,
    units: list[Unit],
    arriving: Arriving,
    before: Before | None,
    wanted: bool = True,
) -> tuple[Arriving | Tensor | None, list[Tensor]]:
    """The launches of one block's backward; `before` is how the block's input was made.

    Returns what arrives at `before`, or without one the gradient of the block's input, or None
    where that is not `wanted`; and the gradients dW, dgamma, dbeta of every convolution in order,
    the shortcut's last.
    """
    plan, first, dz = block.plan, units[0].h, arriving.gradient
    parameters: list[Tensor] = []
    fork = dz if block.adds else None
    for index in reversed(range(len(units))):
        (h, made), conv = units[index], block.convs[index]
        dx, dr, dnorm = _norm_backward(plan, arriving, made)
        if dr is not None:
            fork = _data_gradient(plan, dr, block.shortcut, first, None) if wanted else None
            parameters += [_weight_gradient(plan, dr, first, block.shortcut), *dnorm[2:]]
        parameters = [_weight_gradient(plan, dx, h, conv), *dnorm[:2], *parameters]
        if index:
            arriving = _data_gradient(plan, dx, conv, h, units[index - 1].made)
    if not wanted:
        return None, parameters
    return _data_gradient(plan, dx, block.convs[0], first, before, fork), parameters


def _norm_backward(
    plan: Plan, arriving: Arriving, made: Before
) -> tuple[Tensor | Gradient, Tensor | Gradient | None, Tensor]:
    """dx and, of a shortcut with a norm, dr, stored or to be made on load; and [2, K] dgamma and
    dbeta, [4, K] with the shortcut's below."""
    x, norm, r_norm = made.x, made.norm, made.r_norm
    dnorm, found = bn_sums.coefficients(arriving.partials, x.numel() // x.shape[1], norm, r_norm)
    if plan.prologue and arriving.act == "identity":
        dx, dr = Gradient(arriving.gradient, x, norm.mean, found[:3]), None
        if r_norm is not None:
            dr = Gradient(arriving.gradient, made.residual, r_norm.mean, found[3:])
        return dx, dr, dnorm
    r = None if r_norm is None else made.residual
    dx, dr = bn_passes.apply(arriving.gradient, x, norm, found, r, r_norm, arriving.act)
    return dx, dr, dnorm


def _weight_gradient(plan: Plan, dx: Tensor | Gradient, h: Tensor | Normed, conv: Conv) -> Tensor:
    """dW, in float32 from our kernel and in the weight's type from the library."""
    if plan.wgrad:
        return weight_gradient(dx, h, conv.weight.shape[2:], conv.stride, conv.padding)
    only = [False, True, False]
    return aten.convolution_backward(dx, h, conv.weight, None, *_geometry(conv), only)[1]


def _data_gradient(
    plan: Plan,
    dx: Tensor | Gradient,
    conv: Conv,
    h: Tensor | Normed,
    before: Before | None,
    fork: Tensor | None = None,
) -> Arriving | Tensor:
    """What reaches the unit before the convolution, with the fork; where there is no such unit the
    gradient of h."""
    if plan.dgrad:
        size = stored_h(h).shape[2:]
        dh, partials = data_gradient(
            dx, conv.weight, size, conv.stride, conv.padding, fork=fork, before=before
        )
        return dh if before is None else Arriving(dh, "identity", partials)
    only = [True, False, False]
    dh = aten.convolution_backward(dx, h, conv.weight, None, *_geometry(conv), only)[0]
    if before is None:
        return dh if fork is None else dh + fork
    return arrive(dh, before, fork)


def arrive(dy: Tensor, made: Before, fork: Tensor | None = None) -> Arriving:
    """Launch the sums of what reaches act(z): dy and a second gradient, `fork`."""
    x, norm, act, residual, r_norm, mask = made
    dz, partials = bn_sums.sums(dy, x, norm, act, residual, r_norm, mask, fork)
    return Arriving(dy, act, partials) if dz is None else Arriving(dz, "identity", partials)


class _Trunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blocks: Sequence[Block], saved: list[list[Unit]], h: Tensor, *parameters):
        h = nhwc(h)
        ctx.save_for_backward(h, *parameters)  # for the check that nobody writes into them
        for block in blocks:
            h, units = forward_block(block, h)
            saved.append(units)
        ctx.blocks, ctx.saved = blocks, saved
        ctx.kinds = [parameter.dtype for parameter in parameters]
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        _, saved, gradients = ctx.saved_tensors, ctx.saved, []
        if saved is None:
            raise RuntimeError(
                "the trunk frees its activations in the backward: for a second one run the forward "
                'again, or use set_backend(model, "eager")'
            )
        ctx.saved = None
        arriving = arrive(nhwc(dy), saved[-1][-1].made)
        for block in reversed(ctx.blocks):
            units = saved.pop()  # freed as soon as the block is done
            before = saved[-1][-1].made if saved else None
            wanted = bool(saved) or ctx.needs_input_grad[2]
            arriving, parameters = backward_block(block, units, arriving, before, wanted)
            gradients = parameters + gradients
        return None, None, arriving, *cast(gradients, ctx.kinds)


def cast(tensors: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    """The tensors in these types; those to be converted in few launches."""
    found = [
        tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
        for tensor, dtype in zip(tensors, dtypes, strict=True)
    ]
    pairs = [(a, b) for a, b in zip(found, tensors, strict=True) if a is not b]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
    return found


def run(
    blocks: Sequence[Block], h: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Norm], list[int]]:
    """The blocks over h [N, C, H, W] in the type of their weights; gradients reach h and the
    `parameters`: conv weight, gamma and beta of every convolution in order, a block's shortcut
    last.

    Returns the output, and in the same order every norm with the batch's statistics and how many
    values a channel they are of. Raises ValueError where that is one: it has no variance.
    """
    saved: list[list[Unit]] = []
    y = _Trunk.apply(blocks, saved, h, *parameters)
    found, counts = [], []
    for units in saved:
        last = units[-1].made
        shortcuts = [] if last.r_norm is None else [last.r_norm]
        found += [*(made.norm for _, made in units), *shortcuts]
        sizes = [made.x.numel() // made.x.shape[1] for _, made in units]
        counts += [*sizes, *sizes[-1:] * len(shortcuts)]
    return y, found, counts

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

With pre-activation a unit is  z = norm(x),  h = act(z),  x' = conv(h), and what blocks hand on is
raw: the last x' plus the shortcut, the block's input x or conv_r of its first h. The convolution
that makes this sum delivers the statistics for the next block's first norm. The equations are those
above, the last line in the norm's own block, and the gradient ds of the sum comes past it:

    dx = A*dz + B*(x - mean) + C [+ ds]                 fork is conv_r's data gradient, or nothing

A plan says who does what; it is data (`launches`). What is saved for the backward follows from it:
the block's input, the raw output of every convolution, one bit an element where an identity was
added to a norm's output, and, unless a prologue makes them again, the activations that convolutions
read. Nothing twice.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import bn_passes
from kernels.bn_checks import Norm
from kernels.conv_dgrad import Before
from kernels.conv_prologue import Normed, stored_h
from kernels.launch import nhwc
from models.launches import (
    PLANS,
    Arriving,
    Conv,
    Plan,
    activated,
    arrive,
    convolve,
    grad_input,
    grad_weight,
    norm_backward,
    norm_of,
    sum_backward,
)
from profiling import nvtx

__all__ = ["PLANS", "Block", "Conv", "Plan", "cast", "run"]


class Block(NamedTuple):
    """convs with their acts, one after another; `shortcut` is the convolution of the residual,
    `adds` whether there is a residual at all. preact: norm and act come before each convolution,
    neither before one whose act is None; the shortcut has no norm.
    name: what a profiler shows the block as."""

    plan: Plan
    convs: tuple[Conv, ...]
    acts: tuple[str | None, ...]
    shortcut: Conv | None
    adds: bool
    preact: bool = False
    name: str = ""


class Unit(NamedTuple):
    """What the backward needs of one unit: h, what its convolution read (stored, or made on load),
    and how it went on from there: the raw x, the norm over the batch's statistics and act; at the
    end of a block also the residual, or the mask where that says enough. With pre-activation how h
    was made, None where it is the block's input."""

    h: Tensor | Normed
    made: Before | None


def forward_block(block: Block, h: Tensor) -> tuple[Tensor, list[Unit]]:
    """The launches of one block: h [N, C, H, W] -> out, and what the backward needs."""
    units, given = [], h
    for conv, act in zip(block.convs[:-1], block.acts[:-1], strict=True):
        x, norm = _convolve(block.plan, given, conv)
        units.append(Unit(given, Before(x, norm, act)))
        given = activated(block.plan, x, norm, act)
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
    x, statistics = convolve(plan, h, conv)
    return x, norm_of(x, conv, statistics)


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
        dx, dr, dnorm = norm_backward(plan, arriving, made)
        if dr is not None:
            fork = grad_input(plan, dr, block.shortcut, first, None) if wanted else None
            parameters += [grad_weight(plan, dr, first, block.shortcut), *dnorm[2:]]
        parameters = [grad_weight(plan, dx, h, conv), *dnorm[:2], *parameters]
        if index:
            arriving = grad_input(plan, dx, conv, h, units[index - 1].made)
    if not wanted:
        return None, parameters
    return grad_input(plan, dx, block.convs[0], first, before, fork), parameters


def forward_preact(
    block: Block, x: Tensor, statistics: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Unit]]:
    """The launches of one block with pre-activation: the raw x [N, C, H, W], with its statistics
    where they were delivered -> the raw sum, likewise, and what the backward needs."""
    plan, units, residual = block.plan, [], x
    for index, (conv, act) in enumerate(zip(block.convs, block.acts, strict=True)):
        h, made = x, None
        if act is not None:
            made = Before(x, norm_of(x, conv, statistics), act)
            h = activated(plan, x, made.norm, act)
        units.append(Unit(h, made))
        if index == 0 and block.shortcut is not None:
            residual, _ = convolve(plan, h, block.shortcut)
        last = conv is block.convs[-1]
        x, statistics = convolve(plan, h, conv, residual if last else None)
    return x, statistics, units


def backward_preact(
    block: Block, units: list[Unit], ds: Tensor, wanted: bool = True
) -> tuple[Tensor | None, list[Tensor]]:
    """The launches of one such block's backward, given the gradient of its raw sum.

    Returns the gradient of the block's raw input, or None where that is not `wanted`; and dW with,
    where there is a norm, dgamma and dbeta of every convolution in order, the shortcut's dW last.
    """
    plan, (first, made), shortcut = block.plan, units[0], block.shortcut
    parameters: list[Tensor] = []
    fork, past = None, ds
    if shortcut is not None:
        parameters = [grad_weight(plan, ds, first, shortcut)]
        past = None
        if wanted or made is not None:
            fork = grad_input(plan, ds, shortcut, first, None)
    dx = ds
    for index in reversed(range(len(units))):
        (h, made), conv = units[index], block.convs[index]
        own = [grad_weight(plan, dx, h, conv)]
        if made is None:
            straight = past if shortcut is None else fork
            dx = grad_input(plan, dx, conv, h, None, straight) if wanted else None
        elif index:
            dx, _, dnorm = norm_backward(plan, grad_input(plan, dx, conv, h, made), made)
            own += dnorm
        else:
            arriving = grad_input(plan, dx, conv, h, made, fork)
            dx, dnorm = sum_backward(arriving, made, past)
            own += dnorm
        parameters = own + parameters
    return dx, parameters


class _Trunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blocks: Sequence[Block], saved: list[list[Unit]], h: Tensor, *parameters):
        h = nhwc(h)
        ctx.save_for_backward(h, *parameters)  # for the check that nobody writes into them
        statistics = None
        for block in blocks:
            with nvtx.range(block.name, (*h.shape, block.plan.name)):
                if block.preact:
                    h, statistics, units = forward_preact(block, h, statistics)
                else:
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
        arriving = nhwc(dy)
        if not ctx.blocks[-1].preact:
            arriving = arrive(arriving, saved[-1][-1].made)
        for block in reversed(ctx.blocks):
            units = saved.pop()  # freed as soon as the block is done
            wanted = bool(saved) or ctx.needs_input_grad[2]
            with nvtx.range(block.name, (*stored_h(units[0].h).shape, block.plan.name)):
                if block.preact:
                    arriving, parameters = backward_preact(block, units, arriving, wanted)
                else:
                    before = saved[-1][-1].made if saved else None
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
    """The blocks, all of them with pre-activation or none, over h [N, C, H, W] in the type of their
    weights; gradients reach h and the `parameters`: conv weight and, where there is a norm, gamma
    and beta of every convolution in order, a block's shortcut last.

    Returns the output, and in the same order every norm with the batch's statistics and how many
    values a channel they are of. Raises ValueError where that is one: it has no variance.
    """
    saved: list[list[Unit]] = []
    y = _Trunk.apply(blocks, saved, h, *parameters)
    found, counts = [], []
    for _, made in chain.from_iterable(saved):
        if made is not None:
            norms = [made.norm] if made.r_norm is None else [made.norm, made.r_norm]
            found += norms
            counts += [made.x.numel() // made.x.shape[1]] * len(norms)
    return y, found, counts

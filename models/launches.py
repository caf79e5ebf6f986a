"""What a plan of the trunk launches for one convolution, one norm or one gradient: the library and
our passes over memory, or our convolutions, which do the work of the passes on the way."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import bn_passes, bn_stats, bn_sums
from kernels.bn_checks import Norm
from kernels.conv_dgrad import Before, data_gradient
from kernels.conv_prologue import Gradient, Normed, stored_h
from kernels.conv_stats import forward as convolve_with_statistics
from kernels.conv_wgrad import weight_gradient

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
    """A convolution without bias and the BatchNorm beside it, after it or, with pre-activation,
    before it: weight [K, C, R, S] in the type of the activations, gamma and beta [K] or [C], None
    where there is no norm."""

    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    stride: int
    padding: int
    eps: float


class Arriving(NamedTuple):
    """The gradient that reaches a unit: of z, where `act` is identity, else of act(z), with act'
    still to be taken; and the partial sums of dz."""

    gradient: Tensor
    act: str
    partials: Tensor


def convolve(
    plan: Plan, h: Tensor | Normed, conv: Conv, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The raw convolution [+ residual], and its statistics where our kernel delivers them."""
    if plan.forward:
        steps = (conv.stride, conv.padding)
        return convolve_with_statistics(h, conv.weight, *steps, residual=residual)
    x = aten.convolution(h, conv.weight, None, *_geometry(conv))
    return x if residual is None else x.add_(residual), None


def norm_of(x: Tensor, conv: Conv, statistics: Tensor | None) -> Norm:
    """The norm of `conv` over the batch's statistics of x [N, C, H, W]: delivered, or found in a
    pass. Raises ValueError where there is one value a channel."""
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"batch statistics need more than one value per channel, got {tuple(x.shape)}; "
            "use larger batches or pictures"
        )
    if statistics is None:
        statistics = bn_stats.statistics(x)[:, 0]
    return Norm(conv.gamma, conv.beta, statistics[0], statistics[1], conv.eps)


def activated(plan: Plan, x: Tensor, norm: Norm, act: str) -> Tensor | Normed:
    """act(norm(x)) as the next convolution takes it: stored, or made on load."""
    return Normed(x, norm, act) if plan.prologue else bn_passes.forward(x, norm, None, None, act)[0]


def norm_backward(
    plan: Plan, arriving: Arriving, made: Before
) -> tuple[Tensor | Gradient, Tensor | Gradient | None, Tensor]:
    """dx and, of a shortcut with a norm, dr, stored or to be made on load; and [2, K] dgamma and
    dbeta, [4, K] with the shortcut's below."""
    x, norm, r_norm = made.x, made.norm, made.r_norm
    dnorm, found = _coefficients(arriving, made)
    if plan.prologue and arriving.act == "identity":
        dx, dr = Gradient(arriving.gradient, x, norm.mean, found[:3]), None
        if r_norm is not None:
            dr = Gradient(arriving.gradient, made.residual, r_norm.mean, found[3:])
        return dx, dr, dnorm
    r = None if r_norm is None else made.residual
    dx, dr = bn_passes.apply(arriving.gradient, x, norm, found, r, r_norm, arriving.act)
    return dx, dr, dnorm


def sum_backward(arriving: Arriving, made: Before, more: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of a raw sum x that is normalised, and added elsewhere with the gradient `more`: dx, stored,
    and [2, C] dgamma and dbeta."""
    dnorm, found = _coefficients(arriving, made)
    given = (arriving.gradient, made.x, made.norm, found)
    return bn_passes.apply(*given, act=arriving.act, more=more)[0], dnorm


def _coefficients(arriving: Arriving, made: Before) -> tuple[Tensor, Tensor]:
    count = made.x.numel() // made.x.shape[1]
    return bn_sums.coefficients(arriving.partials, count, made.norm, made.r_norm)


def grad_weight(plan: Plan, dx: Tensor | Gradient, h: Tensor | Normed, conv: Conv) -> Tensor:
    """dW, in float32 from our kernel and in the weight's type from the library."""
    if plan.wgrad:
        return weight_gradient(dx, h, conv.weight.shape[2:], conv.stride, conv.padding)
    only = [False, True, False]
    return aten.convolution_backward(dx, h, conv.weight, None, *_geometry(conv), only)[1]


def grad_input(
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


def _geometry(conv: Conv) -> tuple:
    # stride, padding, dilation, transposed, output padding, groups
    return [conv.stride] * 2, [conv.padding] * 2, [1, 1], False, [0, 0], 1

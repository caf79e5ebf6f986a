"""What a convolution makes of stored tensors while it loads them, so that nobody has to store it.

    Normed      h  = act((x - mean)*weight*rsqrt(var + eps) + bias)     the unit before's output
    Gradient    dy = A*dz + B*(x - mean) + C                            BatchNorm's backward

A launcher takes either of them, or the stored tensor itself. Both are rounded where the kernels
that store them round (`bn_passes`): the sums of a convolution see the same numbers either way.
Outside the image, and past the last row, both are exactly 0, not act(bias) or C.
"""

from typing import NamedTuple

import torch

from kernels.activation import activate
from kernels.bn_checks import Norm
from kernels.bn_sums import load, preactivation
from kernels.launch import nhwc, tl, triton
from kernels.numerics import rounded

NO_NORM = (None, None, None, None, 0.0)


class Normed(NamedTuple):
    """h [N, C, H, W] = act(norm(x)): x the raw output of the convolution before, [N, C, H, W], act
    one of `activation.ACTS`."""

    x: torch.Tensor
    norm: Norm
    act: str


class Gradient(NamedTuple):
    """dy [N, K, P, Q] = A*dz + B*(x - mean) + C, channel by channel.

    dz, x: [N, K, P, Q] of one dtype, the gradient of the normalised x and the raw x. mean: [K].
    coefficients: float32 [3, K], contiguous, the rows A, B and C.
    """

    dz: torch.Tensor
    x: torch.Tensor
    mean: torch.Tensor
    coefficients: torch.Tensor


def stored_h(h: torch.Tensor | Normed) -> torch.Tensor:
    """The tensor of h's shape and dtype that a kernel loads h from, channels-last."""
    return nhwc(h.x if isinstance(h, Normed) else h)


def stored_dy(dy: torch.Tensor | Gradient) -> torch.Tensor:
    """The tensor of dy's shape and dtype that a kernel loads dy from, channels-last."""
    return nhwc(dy.dz if isinstance(dy, Gradient) else dy)


def norm_arguments(h: torch.Tensor | Normed) -> tuple[tuple[torch.Tensor | float | None, ...], str]:
    """(weight, bias, mean, var, eps) and act for a kernel; Nones and "" where h is stored."""
    return (h.norm, h.act) if isinstance(h, Normed) else (NO_NORM, "")


def gradient_arguments(dy: torch.Tensor | Gradient) -> tuple[torch.Tensor | None, ...]:
    """(x, mean, coefficients) for a kernel; Nones where dy is stored."""
    if isinstance(dy, Gradient):
        return nhwc(dy.x), dy.mean, dy.coefficients
    return None, None, None


@triton.jit
def load_coefficients(mean_ptr, coefficients_ptr, k, K: tl.constexpr):
    """mean, A, B and C, float32, of the channels `k`; zeros past the last."""
    mean = load(mean_ptr, k, k < K)
    a = load(coefficients_ptr, k, k < K)
    b = load(coefficients_ptr + K, k, k < K)
    return mean, a, b, load(coefficients_ptr + 2 * K, k, k < K)


@triton.jit
def normed(x, inside, mean, s, b, ACT: tl.constexpr):
    """h of a loaded block x in x's dtype, given `bn_sums.affine`'s values broadcast along it; 0
    where not `inside`."""
    x_wide = x.to(tl.float32)
    z = preactivation(x_wide, mean, s, b, x_wide, mean, s, b, "none", x.dtype)
    return rounded(tl.where(inside, activate(z, ACT), 0.0), x.dtype)


@triton.jit
def gradient(dz, x, inside, mean, a, b, c):
    """dy of loaded blocks dz and x in their dtype, given `load_coefficients`' values broadcast
    along them; 0 where not `inside`."""
    dy = a * dz.to(tl.float32) + b * (x.to(tl.float32) - mean) + c
    return rounded(tl.where(inside, dy, 0.0), dz.dtype)

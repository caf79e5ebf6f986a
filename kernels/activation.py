"""The activations every room shares: their names, the PyTorch reference, and the Triton value and
derivative.

Formulas as in PyTorch: LeakyReLU with slope 0.01, SiLU z*sigmoid(z), exact GELU z*Phi(z)
(Hendrycks and Gimpel 2016), Mish z*tanh(softplus(z)) (Misra 2019).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.launch import check, tl, triton

REFERENCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "mish": F.mish,
}
ACTS = tuple(REFERENCE)
MASK_ACTS = ("identity", "relu", "leaky_relu")  # the sign of the output decides the derivative


def check_act(act: str) -> None:
    """Raise ValueError unless `act` is one of ACTS."""
    check(act in ACTS, lambda: f"act must be one of {', '.join(ACTS)}, not {act!r}")


aten = torch.ops.aten
# act'(z) * dy; autograd is out of reach inside the CPU implementation of a torch.library op
REFERENCE_BACKWARD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "identity": lambda dy, z: dy,
    "relu": lambda dy, z: aten.threshold_backward(dy, z, 0),
    "leaky_relu": lambda dy, z: aten.leaky_relu_backward(dy, z, 0.01, False),
    "silu": lambda dy, z: aten.silu_backward(dy, z),
    "gelu": lambda dy, z: aten.gelu_backward(dy, z),
    "mish": lambda dy, z: aten.mish_backward(dy, z),
}


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z) for a float32 block."""
    if ACT == "relu":
        z = tl.where(z <= 0, 0.0, z)  # as eager: a NaN stays
    elif ACT == "leaky_relu":
        z = tl.where(z > 0, z, 0.01 * z)
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    elif ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "mish":
        z = z * _tanh_softplus(z)
    return z


@triton.jit
def activate_grad(z, ACT: tl.constexpr):
    """act'(z) for a float32 block; for the MASK_ACTS act(z) may stand for z."""
    if ACT == "relu":
        d = tl.where(z > 0, 1.0, 0.0)
    elif ACT == "leaky_relu":
        d = tl.where(z > 0, 1.0, 0.01)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        d = s * (1.0 + z * (1.0 - s))
    elif ACT == "gelu":
        phi = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * phi
    elif ACT == "mish":
        t = _tanh_softplus(z)
        d = t + z * tl.sigmoid(z) * (1.0 - t * t)
    else:
        d = tl.full(z.shape, 1.0, tl.float32)
    return d


@triton.jit
def _tanh_softplus(z):
    # tanh(log(1 + w)) = (w^2 + 2w) / (w^2 + 2w + 2) with w = e^z: no overflow once z is capped
    w = tl.exp(tl.minimum(z, 20.0))
    n = w * (w + 2.0)
    return n / (n + 2.0)

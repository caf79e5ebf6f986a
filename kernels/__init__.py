"""Fused Triton kernels for convolutional networks, usable in any PyTorch model. Imports torch and
triton, nothing of ours.

`KERNELS` is the explicit list of rooms; adding a kernel means one file beside this one and one
line here.
"""

from kernels import add_relu as _add_relu
from kernels.activation import ACTS
from kernels.add_relu import add_relu
from kernels.launch import why_not_triton
from kernels.spec import KernelSpec

KERNELS: tuple[KernelSpec, ...] = (_add_relu.SPEC,)

__all__ = ["ACTS", "KERNELS", "KernelSpec", "add_relu", "why_not_triton"]

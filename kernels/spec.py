"""What a room tells the tests, the benchmarks and ahead-of-time compilation about itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Shape = tuple[int, ...]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and the fewest bytes through device memory (each tensor once)."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class KernelSpec:
    """One kernel family.

    reference, fused: one signature, called with the keyword arguments `make_inputs` returns;
        `reference` is plain PyTorch in any dtype, the truth of the numerics.
    make_inputs: (shape, dtype, device, generator) -> fresh random inputs; the float tensors that
        take a gradient require it.
    launch: calls every plain launcher of the room, forward then backward, on such inputs, once for
        every variant that changes the machine code of a step; works on meta tensors inside
        `launch.record`, which is how ahead-of-time compilation learns what to compile.
    cost: (shape, bytes of an element) -> {"forward": Cost, "backward": Cost}.
    shapes: the room's sites in ResNet-34 at batch 32, 224x224, in the layout its docstring names.
    """

    name: str
    reference: Callable[..., Any]
    fused: Callable[..., Any]
    make_inputs: Callable[[Shape, torch.dtype, torch.device, torch.Generator], Inputs]
    launch: Callable[..., None]
    cost: Callable[[Shape, int], dict[str, Cost]]
    shapes: tuple[Shape, ...]

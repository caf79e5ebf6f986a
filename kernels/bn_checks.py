"""What the BatchNorm rooms bn_act and bn_act_pool share outside of their kernels: the types, the
checks of their inputs, and a BatchNorm's backward in plain PyTorch."""

from typing import NamedTuple

import torch

from kernels.activation import check_act
from kernels.launch import check, check_image, describe

Stats = tuple[torch.Tensor, torch.Tensor]  # mean and biased variance, float32 [C]


class Norm(NamedTuple):
    """A BatchNorm over C channels: everything but eps is [C]."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor | None
    var: torch.Tensor | None
    eps: float


def check_inputs(x: torch.Tensor, act: str, training: bool) -> None:
    """Raise ValueError unless x [N, C, H, W] and `act` are what the kernels take."""
    check_act(act)
    check_image("x", x)
    check(
        not training or x.shape[0] * x.shape[2] * x.shape[3] != 1,
        lambda: f"training needs more than one value per channel, x is {tuple(x.shape)}",
    )


def check_norm(
    x: torch.Tensor, norm: Norm, training: bool, stats: Stats | None, name: str = ""
) -> None:
    """Raise ValueError unless what is read of `norm`, or the delivered `stats` of a batch, fits x;
    the sentence calls the tensors by `name`."""
    tensors = {"weight": norm.weight, "bias": norm.bias}
    if not training:
        tensors |= {"running_mean": norm.mean, "running_var": norm.var}
    elif stats is not None:
        tensors |= {"mean": stats[0], "var": stats[1]}
    for label, t in tensors.items():
        check(t is not None, lambda label=label: f"{name}{label} is missing")
        check(
            t.shape == x.shape[1:2]
            and t.dtype in (torch.float32, x.dtype)
            and t.device == x.device,
            lambda label=label, t=t: (
                f"{name}{label} {describe(t)} must be [{x.shape[1]}] in "
                f"float32 or {x.dtype} on {x.device}"
            ),
        )


def reference_gradients(
    dz: torch.Tensor, x: torch.Tensor, norm: Norm, training: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight and dbias of z = BatchNorm(x) by the equations of bn_act.py, in plain PyTorch;
    mean and var are the batch's, or constants when not `training`."""
    dz, centred = dz.float(), x.float() - norm.mean.float()[:, None, None]
    inv = (norm.var.float() + norm.eps).rsqrt()
    s1, s2 = dz.sum((0, 2, 3)), (dz * centred).sum((0, 2, 3))
    dx = dz
    if training:
        m = max(1, x.numel() // x.shape[1])
        dx = dz - (s1[:, None, None] + (inv * inv * s2)[:, None, None] * centred) / m
    return (dx * (norm.weight * inv)[:, None, None]).to(x.dtype), inv * s2, s1

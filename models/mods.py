"""Modifications of the networks that are modules or functions of their own: GroupNorm,
squeeze-and-excitation, anti-aliased downsampling, stochastic depth."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.activation import REFERENCE

GROUPS = 32  # of GroupNorm where they divide the channels (Wu and He 2018)
REDUCTION = 16  # of squeeze-and-excitation (Hu et al. 2018)


def groups_of(channels: int) -> int:
    """The largest number of groups up to 32 that divides `channels`."""
    return max(groups for groups in range(1, GROUPS + 1) if channels % groups == 0)


def runs_kernel(backend: str, x: Tensor, other: Tensor | None = None) -> bool:
    """Whether a kernel takes x, and the second tensor beside it; float64 is eager's, and so are
    additions that promote."""
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return backend == "triton" and known and (other is None or other.dtype == x.dtype)


class GroupNormAct(nn.GroupNorm):
    """act(group_norm(x) + residual) with the parameters of nn.GroupNorm: one kernel on Triton,
    eager elsewhere. There are no running statistics; training and inference are alike."""

    def __init__(self, groups: int, channels: int, act: str = "relu"):
        super().__init__(groups, channels)
        self.act = act
        self.backend = "eager"

    def forward(self, x: Tensor, residual: Tensor | None = None, act: str | None = None) -> Tensor:
        """x and residual [N, C, H, W] -> [N, C, H, W], in x's type unless the addition promotes:
        autocast, which makes GroupNorm float32, does not double the memory. act: instead of the
        unit's own."""
        act = act or self.act
        if runs_kernel(self.backend, x, residual):
            affine = (self.num_groups, self.weight, self.bias)
            return kernels.group_norm_act(x, *affine, residual=residual, act=act, eps=self.eps)
        y = super().forward(x).to(x.dtype)
        return REFERENCE[act](y if residual is None else y + residual)


class SqueezeExcitation(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean of x over H, W)))): a gate for every channel of an image (Hu et
    al. 2018). Parameters are called as torchvision's, whose fc1 and fc2 are 1x1 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        squeezed = max(1, channels // REDUCTION)
        self.fc1 = nn.Linear(channels, squeezed)
        self.fc2 = nn.Linear(squeezed, channels)
        self.backend = "eager"

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        mean = kernels.avg_pool(x) if runs_kernel(self.backend, x) else x.mean((2, 3))
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(mean))))
        return x * gate.to(x.dtype)[:, :, None, None]


def drop_path(x: Tensor, p: float) -> Tensor:
    """x [N, C, H, W] with each of the N samples set to zero with probability p, the others divided
    by 1 - p (stochastic depth, Huang et al. 2016)."""
    kept = torch.empty((len(x), 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(1 - p)
    return x * (kept / (1 - p))


def blur_pool() -> nn.Sequential:
    """Every second pixel of x after the filter [1 2 1] / 4 in height and width (Zhang 2019), edges
    repeated: [N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)].

    The filter is two averages of neighbours, [1 1] / 2 twice; leaving the padding out of the first
    repeats the edges, so that a single pixel stays what it is.
    """
    pairs = nn.AvgPool2d(2, stride=1, padding=1, count_include_pad=False)
    return nn.Sequential(pairs, nn.AvgPool2d(2, stride=2))


def add_act(z: Tensor, residual: Tensor, act: str, backend: str) -> Tensor:
    """act(z + residual), both [N, C, H, W]."""
    if runs_kernel(backend, z, residual):
        return kernels.add_relu(z, residual, act)
    return REFERENCE[act](z + residual)

"""The units blocks are made of, and the only place that chooses between eager, compiled and Triton.

A block says what it computes (`ConvNormAct` topology: convolution, normalisation, residual,
activation); a unit decides how. Parameters and buffers are those of `nn.Conv2d` and
`nn.BatchNorm2d`, so a state_dict is the same whatever the backend.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.activation import REFERENCE
from kernels.bn_stats import track
from models import compiled

BACKENDS = ("eager", "auto", "compile", "triton")

# What compiling costs and brings on a CPU: seconds to compile (10 to 22 with a warm cache, 34 to 42
# with a cold one) and seconds saved per 224x224 training image. The saving is an upper estimate:
# on 2 Zen 4 cores compiled steps took 0.94x to 1.01x of eager's speed (docs/notes.md).
COMPILE_SECONDS = 30.0
SAVED_SECONDS_PER_IMAGE = 0.001


class BackendUnavailable(Exception):
    """A backend was demanded by name and cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Backend:
    """The path taken: `name` is eager, compile or triton; `reason` says in words why."""

    name: str
    reason: str


def resolve_backend(
    requested: str, device: torch.device, training_images: float | None = None
) -> Backend:
    """Turn eager / auto / compile / triton into the path that will be taken on `device`.

    training_images: images still to be trained on, counted in units of 224x224 pixels; it decides
        whether compiling pays on a CPU. None means many.

    Raises BackendUnavailable when compile or triton is demanded and cannot run.
    """
    if requested == "eager":
        return Backend("eager", "as asked: plain PyTorch")
    no_kernels = kernels.why_not_triton(device)
    if requested == "triton":
        if no_kernels:
            raise BackendUnavailable(
                f"--backend triton cannot run here: {no_kernels}; "
                "use --fused, which falls back to torch.compile or eager"
            )
        return Backend("triton", "as asked: fused Triton kernels")
    no_compiler = compiled.why_not_compile()
    if requested == "compile":
        if no_compiler:
            raise BackendUnavailable(
                f"--backend compile cannot run here: {no_compiler}; use --backend eager"
            )
        return Backend("compile", "as asked: torch.compile")
    if not no_kernels and device.type == "cuda":
        return Backend("triton", f"fused Triton kernels on {torch.cuda.get_device_name(device)}")
    no_kernels = no_kernels or "no CUDA device"
    if no_compiler:
        return Backend("eager", f"{no_kernels} and {no_compiler}: eager instead of the kernels")
    if device.type == "cpu" and training_images is not None:
        saved = SAVED_SECONDS_PER_IMAGE * training_images
        if saved < COMPILE_SECONDS:
            return Backend(
                "eager",
                f"{no_kernels}, and compiling (about {COMPILE_SECONDS:.0f} s) would save only "
                f"about {saved:.0f} s in this run: eager instead of the Triton kernels",
            )
    return Backend("compile", f"{no_kernels}: torch.compile instead of the Triton kernels")


def set_backend(model: nn.Module, backend: str) -> nn.Module:
    """Make every unit of `model` run on `backend` (eager, compile or triton); returns the model."""
    for module in model.modules():
        if isinstance(module, BatchNormAct):
            module.backend = backend
    return model


class BatchNormAct(nn.BatchNorm2d):
    """act(batch_norm(x) + residual), with the parameters, buffers and rules of nn.BatchNorm2d."""

    def __init__(self, num_features: int, act: str = "relu", **batch_norm_options):
        super().__init__(num_features, **batch_norm_options)
        self.act = act
        self.backend = "eager"

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_norm: "BatchNormAct | None" = None,
    ) -> Tensor:
        """x and residual [N, C, H, W] -> [N, C, H, W].

        residual_norm normalises the residual first: the raw output of a shortcut convolution goes
        in, and its BatchNorm is applied in the same pass.
        """
        if self.backend == "eager":
            return self._eager(x, residual, residual_norm)
        fused = kernels.bn_act if self.backend == "triton" else compiled.bn_act
        batch_statistics = self._uses_batch_statistics()
        if batch_statistics:
            self._check_more_than_one_value(x)
        y, *statistics = fused(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            residual=residual,
            residual_norm=None if residual_norm is None else residual_norm._affine(),
            act=self.act,
            training=batch_statistics,
            eps=self.eps,
        )
        count = x.numel() // x.shape[1]
        self._track(*statistics[:2], count)
        if residual_norm is not None:
            residual_norm._track(*statistics[2:], count)
        return y

    def pooled(
        self, x: Tensor, pool: nn.MaxPool2d, stats: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """pool(act(batch_norm(x))); one pass where the kernels run. x [N, C, H, W].

        stats: mean and biased variance [C] of x, where the convolution has delivered them.
        """
        if not self._fuses(pool):
            return pool(self(x))
        batch_statistics = self._uses_batch_statistics()
        if batch_statistics:
            self._check_more_than_one_value(x)
        y, mean, var = kernels.bn_act_pool(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            act=self.act,
            training=batch_statistics,
            eps=self.eps,
            stats=stats,
        )
        self._track(mean, var, x.numel() // x.shape[1])
        return y

    def _fuses(self, pool: nn.MaxPool2d) -> bool:
        window = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        return self.backend == "triton" and window == (3, 2, 1, 1, False)

    def _eager(
        self, x: Tensor, residual: Tensor | None, residual_norm: "BatchNormAct | None"
    ) -> Tensor:
        y = super().forward(x)
        if residual_norm is not None:
            residual = residual_norm(residual)
        if residual is not None:
            y = y + residual
        return F.relu(y, inplace=True) if self.act == "relu" else REFERENCE[self.act](y)

    def _uses_batch_statistics(self) -> bool:
        return self.training or self.running_mean is None

    def _affine(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
        return self.weight, self.bias, self.running_mean, self.running_var, self.eps

    @staticmethod
    def _check_more_than_one_value(x: Tensor) -> None:
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"batch statistics need more than one value per channel, got {tuple(x.shape)}; "
                "use larger batches or pictures"
            )

    @torch.no_grad()
    def _track(self, mean: Tensor | None, var: Tensor | None, count: int) -> None:
        """Move the running statistics as nn.BatchNorm2d does; `var` is the biased variance."""
        if not (self.training and self.track_running_stats):
            return
        buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        if self.backend == "triton":
            track(*buffers, mean, var, count, self.momentum)
            return
        self.num_batches_tracked.add_(1)
        weight = 1.0 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(var * (count / (count - 1)), weight)


def stem(conv: nn.Conv2d, norm: BatchNormAct, pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """pool(act(batch_norm(conv(x)))) for images x [N, C, H, W].

    Where the kernels run, a convolution of images delivers the batch statistics with its output.
    cuDNN is quicker on every other convolution, and on this one in float32.
    """
    if norm._fuses(pool) and norm._uses_batch_statistics() and _delivers_statistics(conv, x):
        stride, padding = conv.stride[0], conv.padding[0]
        y, *stats = kernels.conv_stats(x, conv.weight, stride=stride, padding=padding)
        return norm.pooled(y, pool, tuple(stats))
    return norm.pooled(conv(x), pool)


def _delivers_statistics(conv: nn.Conv2d, x: Tensor) -> bool:
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    (stride, *strides), padding = conv.stride, conv.padding
    return (
        dtype in (torch.bfloat16, torch.float16)
        and conv.in_channels <= 4
        and conv.out_channels % 8 == 0
        and conv.bias is None
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and strides == [stride]
        and isinstance(padding, tuple)
        and padding[0] == padding[1]
    )

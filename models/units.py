"""The units blocks are made of, and the only place that chooses between eager, compiled and Triton.

A block says what it computes (`ConvNormAct` topology: convolution, normalisation, residual,
activation); a unit decides how. Parameters and buffers are those of `nn.Conv2d` and
`nn.BatchNorm2d`, so a state_dict is the same whatever the backend.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.activation import REFERENCE
from kernels.bn_stats import track
from models import compiled, conv_plans, sync_bn, trunk
from models.mods import GroupNormAct, SqueezeExcitation
from models.weight_copies import stand_in


def set_backend(model: nn.Module, backend: str, plan: str = "known") -> nn.Module:
    """Make every unit of `model` run on `backend` (eager, compile or triton); returns the model.

    plan: what triton's blocks are trained on, and single convolutions: `known` takes what was
        measured before on this GPU and what is shipped for it, `measure` measures what is not
        known, a name of `trunk.PLANS` demands that plan.
    """
    check_plan(plan)
    for module in model.modules():
        if isinstance(module, BatchNormAct | GroupNormAct | SqueezeExcitation):
            module.backend = backend
        if isinstance(module, BatchNormAct | TrunkBlock):
            module.plan, module.chosen = plan, {}
    return model


def check_plan(plan: str) -> None:
    """Raise ValueError unless `plan` is one that `set_backend` takes."""
    known = ("known", "measure", *trunk.PLANS)
    if plan not in known:
        raise ValueError(f"unknown plan {plan!r}: choose one of {', '.join(known)}")


def synchronise(model: nn.Module, on: bool = True) -> nn.Module:
    """Let every BatchNorm of `model`, which runs eagerly, train on the statistics of the images of
    all processes, or no longer; returns the model."""
    for module in model.modules():
        if isinstance(module, BatchNormAct):
            module.synchronised = on
    return model


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches the module: it must then be called, and see its own tensors."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


class TrunkBlock(nn.Module):
    """A block that is a chain of convolutions and norms, with or without a shortcut: the trunk can
    train it without calling its `forward`, which must say the same."""

    adds = False  # whether the input, or `downsample` of it, is added before the last activation
    preact = False  # whether a norm comes before its convolution, and the sum stays raw
    downsample: nn.Sequential | None  # a convolution and, without preact, a norm

    def beyond(self) -> list[str]:
        """What it computes besides its chain and its shortcut, in words."""
        return []

    # what follows one another; with preact there may be no norm before the first convolution
    chain: "Callable[[], tuple[tuple[nn.Conv2d, BatchNormAct | None], ...]]"


class BatchNormAct(nn.BatchNorm2d):
    """act(batch_norm(x) + residual), with the parameters, buffers and rules of nn.BatchNorm2d."""

    folded = False  # whether the convolution before it has taken it in (models/folding.py)
    synchronised = False  # whether it trains on the statistics of all processes together

    def __init__(self, num_features: int, act: str = "relu", **batch_norm_options):
        super().__init__(num_features, **batch_norm_options)
        self.act = act
        self.backend = "eager"
        self.plan, self.chosen = "known", {}

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_norm: "BatchNormAct | None" = None,
        act: str | None = None,
    ) -> Tensor:
        """x and residual [N, C, H, W] -> [N, C, H, W].

        residual_norm normalises the residual first: the raw output of a shortcut convolution goes
        in, and its BatchNorm is applied in the same pass. act: instead of the unit's own.
        """
        act = act or self.act
        promotes = residual is not None and residual.dtype != x.dtype  # as eager's addition does
        if self.backend == "eager" or promotes:
            return self._eager(x, residual, residual_norm, act)
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
            act=act,
            training=batch_statistics,
            eps=self.eps,
        )
        count = x.numel() // x.shape[1]
        self._track(*statistics[:2], count)
        if residual_norm is not None:
            residual_norm._track(*statistics[2:], count)
        return y

    def pooled(
        self, x: Tensor, pool: nn.Module, stats: tuple[Tensor, Tensor] | None = None
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

    def _fuses(self, pool: nn.Module) -> bool:
        if self.backend != "triton" or type(pool) is not nn.MaxPool2d or pool.return_indices:
            return False
        window = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        return window == (3, 2, 1, 1, False) and not (hooked(pool) or hooked(self))

    def _eager(
        self, x: Tensor, residual: Tensor | None, residual_norm: "BatchNormAct | None", act: str
    ) -> Tensor:
        if self.synchronised and self.training:
            y, mean, var, count = sync_bn.batch_norm(x, self.weight, self.bias, self.eps)
            self._track(mean, var, count)
        else:
            y = x if self.folded else super().forward(x)
        if residual_norm is not None:
            residual = residual_norm(residual)
        if residual is not None:
            y = y + residual
        return F.relu(y, inplace=True) if act == "relu" else REFERENCE[act](y)

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

    @property
    def _tracks(self) -> bool:
        return self.training and self.track_running_stats

    @torch.no_grad()
    def _track(self, mean: Tensor | None, var: Tensor | None, count: int | Tensor) -> None:
        """Move the running statistics as nn.BatchNorm2d does; `var` is the biased variance."""
        if not self._tracks:
            return
        buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        if self.backend == "triton" and self.running_mean.dtype == torch.float32:
            track(*buffers, mean, var, count, self.momentum)
            return
        mean, var = mean.to(self.running_mean.dtype), var.to(self.running_var.dtype)
        self.num_batches_tracked.add_(1)
        weight = 1.0 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(var * (count / (count - 1)), weight)


def conv_norm_act(
    conv: nn.Module,
    norm: BatchNormAct | GroupNormAct,
    x: Tensor,
    residual: Tensor | None = None,
    downsample: nn.Sequential | None = None,
    act: str | None = None,
) -> Tensor:
    """act(norm(conv(x)) + downsample(residual)): x [N, C, H, W] -> [N, K, P, Q].

    downsample: ends in a norm's unit; without it the residual is added as it is. In training its
    BatchNorm runs in the same pass as `norm`; without gradients a convolution is one kernel,
    BatchNorm, addition and activation included, unless the library and a pass are known to be
    faster. act: instead of the norm's own.
    """
    act = act or norm.act
    if isinstance(norm, GroupNormAct):
        if downsample is not None:
            residual = conv_norm_act(*downsample, residual)
        return norm(conv(x), residual, act)
    folds = _folds(conv, norm, x, act, residual is not None)
    shortcut_norm = None
    if downsample is not None:
        *layers, shortcut_norm = downsample
        last = layers[-1] if layers else nn.Identity()
        for layer in layers[:-1]:
            residual = layer(residual)
        # a pass has one mode; one of the two may be frozen
        alone = norm._uses_batch_statistics() != shortcut_norm._uses_batch_statistics()
        if folds or alone or _folds(last, shortcut_norm, residual, shortcut_norm.act, False):
            residual, shortcut_norm = conv_norm_act(last, shortcut_norm, residual), None
        else:
            residual = last(residual)
    if not folds or (residual is not None and residual.dtype != compute_dtype(x)):
        return norm(conv(x), residual, shortcut_norm, act)
    return kernels.conv_bn_act(
        x,
        conv.weight,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        residual=residual,
        stride=conv.stride[0],
        padding=conv.padding[0],
        act=act,
        eps=norm.eps,
    )


def stem(conv: nn.Module, norm: BatchNormAct | GroupNormAct, pool: nn.Module, x: Tensor) -> Tensor:
    """pool(act(norm(conv(x)))) for images x [N, C, H, W].

    Where the kernels run, the convolution of images is ours, which delivers the batch statistics,
    unless cuDNN's is known to be faster.
    """
    if isinstance(norm, GroupNormAct):
        return pool(norm(conv(x)))
    if norm._fuses(pool) and takes(conv, x) and conv.in_channels <= 4:
        learns = torch.is_grad_enabled() and conv.weight.requires_grad
        use = "stem training" if learns else "stem inference"
        plan = conv_plans.settled(use, conv, norm, x, compute_dtype(x), norm.act, False)
        weight = stand_in(conv.weight, compute_dtype(x))
        geometry = {"stride": conv.stride[0], "padding": conv.padding[0]}
        if plan.forward:
            y, *stats = kernels.conv_stats(x, weight, **geometry, own_wgrad=plan.wgrad)
            return norm.pooled(y, pool, tuple(stats))
        return norm.pooled(F.conv2d(x, weight, **geometry), pool)
    return norm.pooled(conv(x), pool)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), on the copies of its weights that are in use: x [N, C] -> [N, K]."""
    if type(layer) is not nn.Linear or hooked(layer) or torch.compiler.is_compiling():
        return layer(x)
    weight = stand_in(layer.weight, compute_dtype(x))
    if weight is layer.weight:
        return layer(x)
    return F.linear(x, weight, None if layer.bias is None else stand_in(layer.bias, weight.dtype))


def _folds(conv: nn.Module, norm: BatchNormAct, x: Tensor, act: str, has_residual: bool) -> bool:
    """Whether convolution and norm run as one kernel: it knows no gradient and no batch
    statistics, and it is not known to be slower."""
    if norm.backend != "triton" or torch.is_grad_enabled() or norm._uses_batch_statistics():
        return False
    if not takes(conv, x):
        return False
    site = (conv, norm, x, compute_dtype(x), act, has_residual)
    return conv_plans.settled("inference", *site).forward


def takes(conv: nn.Module, x: Tensor) -> bool:
    """Whether our convolution computes `conv`, in 16 bits: in float32 the library's is faster."""
    return (
        type(conv) is nn.Conv2d
        and compute_dtype(x) in (torch.bfloat16, torch.float16)
        and (conv.in_channels % 8 == 0 or conv.in_channels <= 4)
        and conv.out_channels % 8 == 0
        and conv.bias is None
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.stride[0] == conv.stride[1]
        and isinstance(conv.padding, tuple)
        and conv.padding[0] == conv.padding[1]
        and not hooked(conv)
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of a convolution's input."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype

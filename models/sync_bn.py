"""Batch normalisation over the images of all processes (Zhang et al. 2018, section 3.2).

Each process finds the mean and M2 = sum (x - mean)^2 of its own n values a channel; what is summed
over the processes, in one all-reduce of float64, is n, n*mean and M2 + n*mean^2:

    N = sum n;   mean = sum(n*mean_i) / N;   var = sum(M2_i + n_i*mean_i^2) / N - mean^2
    y = gamma*xhat + beta,  xhat = (x - mean) / sqrt(var + eps)
    dx = gamma / sqrt(var + eps) * (dy - sum(dy)/N - xhat*sum(dy*xhat)/N)

with the last two sums over all processes, in one more all-reduce; dgamma and dbeta are those of the
process's own images, as every other gradient is. In float64 the difference of two large numbers
keeps what float32 had. A process without images takes part with n = 0.
"""

import torch
import torch.distributed as dist
from torch import Tensor

AXES = (0, 2, 3)


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [N, C, H, W] in the type of x; mean and biased variance [C] of all processes' x, and the
    count [] of their values a channel. Every process of the default group must call it."""
    return _SyncBatchNorm.apply(x, weight, bias, eps)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        values, channels = _widened(x), x.shape[1]
        count = x.numel() // channels
        sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
        if count:
            var, mean = (s.double() for s in torch.var_mean(values, AXES, correction=0))
            torch.cat([count * mean, count * (var + mean**2), sums[-1:] + count], out=sums)
        dist.all_reduce(sums)
        total = sums[-1]
        mean, square = (sums[:-1] / total).view(2, channels)
        var = (square - mean**2).clamp(min=0)
        mean, var, scale = (s.to(values.dtype) for s in (mean, var, (var + eps).rsqrt()))
        ctx.save_for_backward(x, weight, mean, scale, total)
        y = _normalised(values, mean, scale) * _wide(weight) + _wide(bias)
        ctx.mark_non_differentiable(mean, var, total)
        return y.to(x.dtype), mean, var, total

    @staticmethod
    def backward(ctx, dy: Tensor, *_: Tensor):
        x, weight, mean, scale, total = ctx.saved_tensors
        dy = _widened(dy)
        xhat = _normalised(_widened(x), mean, scale)
        own = torch.cat([dy.sum(AXES), (dy * xhat).sum(AXES)])
        sums = own.clone()
        dist.all_reduce(sums)
        of_dy, of_both = (sums / total.to(sums.dtype)).chunk(2)
        dx = _wide(weight * scale) * (dy - _wide(of_dy) - xhat * _wide(of_both))
        dbias, dweight = own.chunk(2)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None


def _widened(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _wide(values: Tensor) -> Tensor:
    """[C] as [C, 1, 1]."""
    return values[:, None, None]


def _normalised(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (x - _wide(mean)) * _wide(scale)

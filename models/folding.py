"""BatchNorm folded into the convolutions before it, for inference where no kernel of ours does it.

    s = gamma / sqrt(var + eps)    t = beta - mean*s
    s * conv(x, W) + t = conv(x, s*W) + t

The GPU kernels apply s and t in the convolution's epilogue and need no copy of the weights.
"""

import copy

import torch
from torch import Tensor, nn

from models.units import BatchNormAct, set_backend


def folded(model: nn.Module, image_size: int = 64) -> nn.Module:
    """A copy of `model` for inference, its BatchNorms part of the convolutions they follow.

    The weights are multiplied in float64 and rounded once to their dtype. A norm that follows no
    convolution, as the first of a pre-activation block, stays as it is. Which follows which is seen
    from one grey image [1, 3, image_size, image_size].
    """
    model = set_backend(copy.deepcopy(model), "eager").eval()
    for conv, norm in _pairs(model, image_size):
        _fold(conv, norm)
    return model


@torch.no_grad()
def _pairs(model: nn.Module, image_size: int) -> list[tuple[nn.Conv2d, BatchNormAct]]:
    """The convolutions whose output is what a BatchNorm takes, and that BatchNorm."""
    made: list[tuple[Tensor, nn.Conv2d]] = []  # kept alive, so that no other tensor is taken for it
    pairs = []

    def convolved(conv: nn.Conv2d, _, output: Tensor) -> None:
        made.append((output, conv))

    def normalises(norm: BatchNormAct, inputs: tuple[Tensor, ...]) -> None:
        pairs.extend((conv, norm) for output, conv in made if output is inputs[0])

    hooks = [
        m.register_forward_hook(convolved) for m in model.modules() if isinstance(m, nn.Conv2d)
    ]
    hooks += [
        m.register_forward_pre_hook(normalises)
        for m in model.modules()
        if isinstance(m, BatchNormAct)
    ]
    first = next(model.parameters())
    model(torch.zeros(1, 3, image_size, image_size, dtype=first.dtype, device=first.device))
    for hook in hooks:
        hook.remove()
    return pairs


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: BatchNormAct) -> None:
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    if conv.bias is not None:
        shift = shift + scale * conv.bias.double()
    conv.weight.copy_(conv.weight.double() * scale.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
    norm.folded = True

"""Fused Triton kernels for convolutional networks, usable in any PyTorch model. Imports torch and
triton, nothing of ours.

`KERNELS` is the explicit list of rooms; adding a kernel means one file beside this one and one
line here.
"""

from kernels import add_relu as _add_relu
from kernels import avg_pool as _avg_pool
from kernels import bn_act as _bn_act
from kernels import conv_bn_act as _conv_bn_act
from kernels import conv_stats as _conv_stats
from kernels import group_norm_act as _group_norm_act
from kernels import head as _head
from kernels import image_prep as _image_prep
from kernels import stem_pool as _stem_pool
from kernels.activation import ACTS
from kernels.add_relu import add_relu
from kernels.avg_pool import avg_pool
from kernels.bn_act import bn_act
from kernels.conv_bn_act import conv_bn_act
from kernels.conv_stats import conv_stats
from kernels.group_norm_act import group_norm_act
from kernels.head import cross_entropy, loss_and_correct
from kernels.image_prep import image_prep
from kernels.launch import why_not_triton
from kernels.spec import KernelSpec
from kernels.stem_pool import bn_act_pool

KERNELS: tuple[KernelSpec, ...] = (
    _add_relu.SPEC,
    _bn_act.SPEC,
    _stem_pool.SPEC,
    _conv_stats.SPEC,
    _conv_bn_act.SPEC,
    _group_norm_act.SPEC,
    _avg_pool.SPEC,
    _head.SPEC,
    _image_prep.SPEC,
)

__all__ = [
    "ACTS",
    "KERNELS",
    "KernelSpec",
    "add_relu",
    "avg_pool",
    "bn_act",
    "bn_act_pool",
    "conv_bn_act",
    "conv_stats",
    "cross_entropy",
    "group_norm_act",
    "image_prep",
    "loss_and_correct",
    "why_not_triton",
]

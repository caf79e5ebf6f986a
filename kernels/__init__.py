"""Fused Triton kernels for convolutional networks, usable in any PyTorch model. Imports torch and
triton, nothing of ours.

`KERNELS` is the explicit list of rooms; a new one is imported, listed and exported here.
"""

from kernels.activation import ACTS
from kernels.add_relu import SPEC as ADD_RELU
from kernels.add_relu import add_relu
from kernels.avg_pool import SPEC as AVG_POOL
from kernels.avg_pool import avg_pool
from kernels.bn_act import SPEC as BN_ACT
from kernels.bn_act import bn_act
from kernels.conv_bn_act import SPEC as CONV_BN_ACT
from kernels.conv_bn_act import conv_bn_act
from kernels.conv_dgrad import SPEC as CONV_DGRAD
from kernels.conv_dgrad import conv_dgrad
from kernels.conv_stats import SPEC as CONV_STATS
from kernels.conv_stats import conv_stats
from kernels.conv_wgrad import SPEC as CONV_WGRAD
from kernels.conv_wgrad import conv_wgrad
from kernels.group_norm_act import SPEC as GROUP_NORM_ACT
from kernels.group_norm_act import group_norm_act
from kernels.head import SPEC as HEAD
from kernels.head import cross_entropy, loss_and_correct
from kernels.image_prep import SPEC as IMAGE_PREP
from kernels.image_prep import image_prep
from kernels.launch import why_not_triton
from kernels.spec import KernelSpec
from kernels.stem_pool import SPEC as STEM_POOL
from kernels.stem_pool import bn_act_pool
from kernels.weight_update import SPEC as WEIGHT_UPDATE
from kernels.weight_update import adamw_, sgd_

KERNELS: tuple[KernelSpec, ...] = (
    ADD_RELU,
    BN_ACT,
    STEM_POOL,
    CONV_STATS,
    CONV_DGRAD,
    CONV_WGRAD,
    CONV_BN_ACT,
    GROUP_NORM_ACT,
    AVG_POOL,
    HEAD,
    IMAGE_PREP,
    WEIGHT_UPDATE,
)

__all__ = [
    "ACTS",
    "KERNELS",
    "KernelSpec",
    "adamw_",
    "add_relu",
    "avg_pool",
    "bn_act",
    "bn_act_pool",
    "conv_bn_act",
    "conv_dgrad",
    "conv_stats",
    "conv_wgrad",
    "cross_entropy",
    "group_norm_act",
    "image_prep",
    "loss_and_correct",
    "sgd_",
    "why_not_triton",
]

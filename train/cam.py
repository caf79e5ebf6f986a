"""Class activation maps: which places of a photo speak for a class.

Behind the global average pool there is one linear layer, so a class's logit is the mean over places
of w_class . features(place) + b: that product is the map (Zhou et al., "Learning deep features for
discriminative localization", CVPR 2016). It is exact for these networks.
"""

import cv2
import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor, nn

SHARE = 0.5  # of the colours in an overlay, the rest is the photo


@torch.inference_mode()
def activation_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The logits [N, K] of images [N, 3, H, W] and the maps [N, K, h, w] whose mean they are, both
    in float32 and without the linear layer's bias in the maps."""
    seen: list[Tensor] = []
    hook = model.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = model(images)
    finally:
        hook.remove()
    maps = torch.einsum("nchw,kc->nkhw", seen[0].float(), model.fc.weight.float())
    return logits.float(), maps


def overlay(picture: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """A photo uint8 [H, W, 3] under the colours of a map float [h, w]: the most telling place is
    bright, what says nothing or speaks against the class is dark."""
    height, width = picture.shape[:2]
    large = cv2.resize(evidence.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    strength = np.clip(large / max(float(large.max()), 1e-12), 0, 1)
    colours = 255 * colormaps["inferno"](strength)[..., :3]
    return np.rint(SHARE * colours + (1 - SHARE) * picture).astype(np.uint8)

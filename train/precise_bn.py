"""Running statistics for the averaged weights.

The moving average of the weights is a network that no training step has run: an average of the
running statistics of all the networks behind it fits it as little as that of any single one, and
none of them has seen a photo as it is, but crops, turned, recoloured and mixed. So before it is
validated or saved, batch normalisation measures its inputs in it anew, on training photos as
validation sees them; docs/recipes.md says what that brings. (Izmailov et al. 2018, "Averaging
weights leads to wider optima", section 3; Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm",
section 3: precise BatchNorm.)
"""

import torch
from torch import nn

from models.units import BatchNormAct
from train.config import Config
from train.data.augment import order
from train.data.loader import Loader
from train.inputs import Inputs, clean_loader
from train.training import Training

IMAGES = 256  # that measure
DRAW = 0xB11  # of them: no epoch's order of training images


def make_loader(inputs: Inputs, config: Config, dtype: torch.dtype, device: torch.device) -> Loader:
    """The training photos that measure, the same on every process, in batches of one size, as each
    batch counts alike."""
    train = inputs.split.train
    batch = min(len(train), max(2, config.optim.val_batch_size))
    images = max(1, min(len(train), IMAGES) // batch) * batch
    rows = train[order(len(train), config.run.seed, DRAW)[:images]]
    return clean_loader(inputs, config, rows, batch, dtype, device)


@torch.inference_mode()
def measure(training: Training, model: nn.Module, loader: Loader) -> None:
    """Give the average its running statistics. model: holds it, in eval mode (see `evaluating`).
    Layers that are frozen keep theirs."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, BatchNormAct)
        and module.track_running_stats
        and all(parameter.requires_grad for parameter in module.parameters())
    ]
    if not norms:
        return
    kept = [(norm.momentum, norm.synchronised) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # every batch counts alike
        norm.synchronised = False  # all processes see the same images
        norm.train()
    for batch in loader.epoch(0):
        with training.autocast():
            model(batch.images)
    for norm, settings in zip(norms, kept, strict=True):
        norm.momentum, norm.synchronised = settings
        norm.eval()
    for name, buffer in model.named_buffers():
        training.average.state[name].copy_(buffer)

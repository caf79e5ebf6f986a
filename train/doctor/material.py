"""What the start record of a run says: its settings, its photos, its network, its images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from train import distributed
from train.config import Config, to_dict
from train.data.augment import order
from train.data.loader import Batch
from train.doctor.probe import IMAGES, Probe, norm_images
from train.doctor.signals import SCHEMA
from train.inputs import Inputs, clean_loader
from train.training import Training

PROBE_EPOCH = 0xD0C  # the draw of the probe's images: no epoch's order of training images


def probe_batch(inputs: Inputs, config: Config, dtype: torch.dtype, device: torch.device) -> Batch:
    """The doctor's training images, drawn at random and as validation sees them."""
    train = inputs.split.train
    chosen = train[order(len(train), config.run.seed, PROBE_EPOCH)[:IMAGES]]
    return next(clean_loader(inputs, config, chosen, IMAGES, dtype, device).epoch(0))


def material_of(
    inputs: Inputs, config: Config, dtype: torch.dtype, device: torch.device
) -> tuple[Batch, dict[str, Any]]:
    """The doctor's images of a run, and what its start record says of settings and photos."""
    split, digests = inputs.split, np.asarray(inputs.photos.digests)
    val_labels, classes = inputs.photos.labels[split.val], len(inputs.photos.classes)
    facts = {
        "config": to_dict(config),
        "classes": list(inputs.photos.classes),
        "train_counts": inputs.train_counts(),
        "val_counts": np.bincount(val_labels, minlength=classes).tolist(),
        "twins": {
            "identical": int(np.isin(digests[split.val], digests[split.train]).sum()),
            "alike": round(split.leaked_share * len(split.val)),
        },
    }
    return probe_batch(inputs, config, dtype, device), facts


def network_of(training: Training, probe: Probe, steps: int) -> dict[str, Any]:
    """The network, the run and the images as they are fed; `steps` an epoch. The probe has measured
    once, and knows the layers and their maps, at the size of evaluation."""
    batch, model = probe.batch, training.model
    optimised = {id(p) for g in training.step.optimizer.param_groups for p in g["params"]}
    parameters = list(model.named_parameters())
    pixels = batch.images.float()
    together, positions = norm_images(training.config), probe.norm_positions.values()
    deviation, mean = torch.std_mean(pixels, (0, 2, 3))
    return {
        "schema": SCHEMA,
        "first_step": training.steps,
        "steps_per_epoch": steps,
        "total_steps": training.total_steps,
        "epochs": training.config.epochs,
        "batch_size": training.config.batch_size,
        "norm_images": together,
        "norm_values": together * min(positions) if positions else None,
        "processes": distributed.size(),
        "amp": str(training.amp_dtype).removeprefix("torch."),
        "layers": [_describe(name, model, *probe.shapes[name]) for name in probe.layers],
        "frozen": [name for name, p in parameters if not p.requires_grad],
        "not_optimised": [n for n, p in parameters if p.requires_grad and id(p) not in optimised],
        "parameters": {name: p.numel() for name, p in parameters},
        "input": {
            "mean": mean.tolist(),
            "std": deviation.tolist(),
            "finite": bool(pixels.isfinite().all()),
        },
        "probe_labels": batch.labels.tolist(),
    }


def _describe(
    name: str, model: nn.Module, shape_in: Sequence[int], shape_out: Sequence[int]
) -> dict[str, Any]:
    """A layer as the rules see it; `shortcut`: whether a block around it adds its input."""
    module = model.get_submodule(name)
    parents = [model.get_submodule(name[:i]) for i, c in enumerate(name) if c == "."]
    conv = isinstance(module, nn.Conv2d)
    return {
        "name": name,
        "kind": "conv" if conv else "linear",
        "kernel": list(module.kernel_size) if conv else None,
        "padding": list(module.padding) if conv and not isinstance(module.padding, str) else None,
        "in": list(shape_in),
        "out": list(shape_out),
        "shortcut": any(getattr(parent, "adds", False) for parent in parents),
    }

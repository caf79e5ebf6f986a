"""What a run is put together from: its network, and the training around it."""

import dataclasses
from typing import Any

import torch
from torch import nn

from models import Backend, build_model, set_backend
from train import distributed
from train.config import Config
from train.data.loader import Loader
from train.data.resident import ResidentLoader
from train.inputs import Inputs
from train.training import Training


def build(config: Config, num_classes: int, backend: Backend, device: torch.device) -> nn.Module:
    """The network of `config`, on its device and backend."""
    options: dict[str, Any] = dataclasses.asdict(config.model)
    model = build_model(options.pop("model"), num_classes, **options)
    set_backend(model, backend.name, backend.plan)
    layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)


def make_training(
    config: Config,
    inputs: Inputs,
    model: nn.Module,
    loader: Loader | ResidentLoader,
    backend: Backend,
    amp_dtype: torch.dtype | None,
) -> Training:
    """The training of `model`, on its device, from the batches of `loader`."""
    triton, device = backend.name == "triton", next(model.parameters()).device
    return Training(
        model,
        config.optim,
        total_steps=config.optim.epochs * len(loader),
        amp_dtype=amp_dtype,
        mixup_alpha=config.data.mixup,
        cutmix_alpha=config.data.cutmix,
        seed=config.run.seed,
        fused=triton,
        make_batch=loader.make if isinstance(loader, ResidentLoader) else None,
        class_counts=inputs.train_counts(),
        cuda_graph=device.type == "cuda" and triton and distributed.size() == 1,
    )

"""Optimizers, learning-rate schedules and the moving average of weights."""

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)

from train.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD or AdamW; weight decay reaches matrices and filters, not biases and normalisation."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int
) -> LRScheduler:
    """The learning rate of each of `total_steps` steps; step the schedule after every update."""
    if config.schedule == "onecycle" and total_steps > 1:
        return OneCycleLR(
            optimizer, max_lr=config.lr, total_steps=total_steps, cycle_momentum=False
        )
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=total_steps)
    if config.schedule == "step":
        milestones = [round(0.6 * total_steps), round(0.85 * total_steps)]
        return MultiStepLR(optimizer, milestones, gamma=0.1)
    if config.schedule == "cyclic":
        half = max(1, total_steps // 8)  # four triangles (Smith 2017)
        return CyclicLR(
            optimizer,
            base_lr=config.lr / 10,
            max_lr=config.lr,
            step_size_up=half,
            cycle_momentum=False,
        )
    return ConstantLR(optimizer, factor=1.0, total_iters=0)


class WeightAverage:
    """Exponential moving average of a model's parameters and buffers (Polyak and Juditsky 1992).

    The decay warms up as (1 + n) / (10 + n) after n updates, so that early weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of `model`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = model.state_dict()
        floats = [name for name, value in self.state.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.state[name] for name in floats],
            [current[name].detach() for name in floats],
            1.0 - decay,
        )
        for name, value in self.state.items():
            if not value.is_floating_point():
                value.copy_(current[name])

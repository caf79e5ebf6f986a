"""The benchmark's networks, and what spoils a network or its training."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models import build_model
from train.doctor.bench.pictures import CLASSES
from train.training import Training


def micro(name: str = "micro_resnet", **options) -> nn.Module:
    return build_model(name, CLASSES, **{"stem": "small"} | options)


def stack(depth: int, act: type[nn.Module] = nn.ReLU, width: int = 16) -> nn.Module:
    """Plain convolutions, one after the other, without norms."""
    layers: list[nn.Module] = []
    for number in range(depth):
        into, stride = (width, 1) if number else (3, 4)
        layers += [nn.Conv2d(into, width, 3, stride, padding=1), act()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def changed_by(make: Callable[[], nn.Module], change: Callable[[nn.Module], Any]):
    """The network of `make` after `change`."""

    def changed() -> nn.Module:
        model = make()
        with torch.no_grad():
            change(model)
        return model

    return changed


def biased(value: float, kind: type[nn.Module] = nn.BatchNorm2d) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                nn.init.constant_(module.bias, value)

    return change


def small_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.mul_(0.1)
            module.bias.zero_()


def mean_colour() -> nn.Module:
    """All that it may know of a picture is what its pixels add up to."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def narrow() -> nn.Module:
    """One convolution of two filters, all that it may know of a picture two averages."""
    return nn.Sequential(
        nn.Conv2d(3, 2, 3, 2, bias=False),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, CLASSES),
    )


def forget(training: Training) -> None:
    group = training.step.optimizer.param_groups[0]
    group["params"] = group["params"][:-4]


def never_trains(training: Training) -> None:
    """Each step begins with `model.eval()`."""
    usual = training.run_step

    def run_step(*inputs: Tensor) -> Tensor:
        training.model.eval()
        return usual(*inputs)

    training.run_step = run_step


def never_evaluates(training: Training) -> None:
    """The validation runs in training mode."""
    usual = training.autocast

    def autocast() -> contextlib.AbstractContextManager:
        if torch.is_inference_mode_enabled():
            training.model.train()
        return usual()

    training.autocast = autocast


def overscaled(training: Training) -> None:
    """A loss scale of float16 so large that dozens of updates are lost until it has halved
    enough."""
    training.step.scale.factor.fill_(2.0**60)


def leap(training: Training) -> None:
    """From step 40 on the rate is a thousand times what the schedule says."""
    usual = training.learning_rate
    training.learning_rate = lambda: usual() * (1000 if training.steps >= 40 else 1)

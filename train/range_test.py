"""Which learning rate a network takes: the range test of Smith (2017).

A hundred steps on a copy of the network, while the rate grows from one that does nothing to one
that destroys.
"""

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from train.config import OptimConfig
from train.data.loader import Loader
from train.data.resident import ResidentLoader
from train.errors import UsageError
from train.files import write_atomically
from train.plots import SOFT, TRAIN, VALIDATION, png, style_axes
from train.training import Training

STEPS = 100
LOWEST, HIGHEST = 1e-6, 10.0
SMOOTHING = 0.9  # of the moving average of the loss: ten steps long
ENDS_AT = 3.0  # times the lowest smoothed loss: further up there is nothing to see
FALLS = 0.98  # of the first losses: what a curve must reach to say anything
MARGIN = 5.0  # below the rate of the lowest loss, where growth and decay already hold each other


@dataclass(frozen=True)
class RangeTest:
    """Rates and smoothed losses, a step each; the rate to take, and why in words."""

    rates: list[float]
    losses: list[float]
    suggestion: float
    reason: str


def find_rate(
    model: nn.Module,
    config: OptimConfig,
    loader: Loader | ResidentLoader,
    amp_dtype: torch.dtype | None,
    class_counts: Sequence[int] | None = None,
) -> RangeTest:
    """Run the test on a copy of `model`, without mixup: the weights, running statistics and random
    states of the training to come stay as they are.

    Raises UsageError where no rate lowers the loss.
    """
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    quiet = replace(config, lr=0.0, ema=0.0, schedule="constant")
    with torch.random.fork_rng(devices):
        trial = Training(
            copy.deepcopy(model).train(),
            quiet,
            total_steps=STEPS,
            amp_dtype=amp_dtype,
            class_counts=class_counts,
        )
        return read(*_climb(trial, loader))


def _climb(trial: Training, loader: Loader | ResidentLoader) -> tuple[list[float], list[float]]:
    """Rates and smoothed losses, until the loss runs away."""
    rates, losses, average, lowest = [], [], 0.0, math.inf
    growth = (HIGHEST / LOWEST) ** (1 / (STEPS - 1))
    with tqdm(total=STEPS, desc="range test", unit="step", leave=False) as bar:
        epoch = 0
        while len(rates) < STEPS:
            epoch += 1
            with contextlib.closing(loader.epoch(epoch)) as batches:
                for batch in batches:
                    rate = LOWEST * growth ** len(rates)
                    trial.rate.fill_(rate)
                    loss = trial.step(batch.images, batch.labels)[0].item()
                    average = SMOOTHING * average + (1 - SMOOTHING) * loss
                    smooth = average / (1 - SMOOTHING ** (len(rates) + 1))
                    if not math.isfinite(loss) or smooth > ENDS_AT * lowest:
                        return rates, losses
                    lowest = min(lowest, smooth)
                    rates.append(rate)
                    losses.append(smooth)
                    bar.update()
                    if len(rates) == STEPS:
                        break
    return rates, losses


def read(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """What a curve of smoothed losses suggests. Raises UsageError where it never falls."""
    start = min(losses[:10]) if losses else 0.0
    best = int(np.argmin(losses)) if losses else 0
    if not losses or losses[best] > FALLS * start:
        raise UsageError(
            f"no learning rate from {LOWEST:g} to {HIGHEST:g} lowers the loss: look at the data, "
            "--init and --act first, or give a number to --lr"
        )
    suggestion = float(f"{rates[best] / MARGIN:.1g}")
    reason = (
        f"the smoothed loss is lowest, {losses[best]:.3g} after {start:.3g}, at a rate of "
        f"{rates[best]:.2g}; a {MARGIN:.0f}th of it keeps a distance from where it turns up"
    )
    return RangeTest(list(rates), list(losses), suggestion, reason)


def picture(found: RangeTest) -> bytes:
    """The curve as a PNG."""
    figure = Figure(figsize=(6.4, 3.1), layout="constrained", facecolor="white")
    axes = figure.subplots()
    style_axes(axes, "Range test: smoothed training loss", "learning rate")
    axes.plot(found.rates, found.losses, color=TRAIN, linewidth=1.8)
    axes.axvline(found.suggestion, color=VALIDATION, linewidth=1.4)
    axes.annotate(
        f"  {found.suggestion:g}",
        (found.suggestion, 0.95),
        xycoords=("data", "axes fraction"),
        color=VALIDATION,
        fontsize=9,
    )
    lowest = int(np.argmin(found.losses))
    axes.plot(found.rates[lowest], found.losses[lowest], "o", ms=6, mfc="none", color=SOFT)
    axes.set_xscale("log")
    return png(figure)


def announce(found: RangeTest, path: Path) -> None:
    """Write the picture to `path` and say what was found. Raises DiskError."""
    write_atomically(path, picture(found))
    print(f"learning rate: {found.suggestion:g} ({found.reason}); curve: {path}")

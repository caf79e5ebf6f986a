"""Which learning rate a network takes: the range test of Smith (2017).

A hundred steps on a copy of the network, more where batches are small, while the rate grows from
one that does nothing to one that destroys.
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
from train.optim import set_rate
from train.plots import SOFT, TRAIN, VALIDATION, png, style_axes
from train.training import Training

STEPS = 100  # of batches of FULL images; of smaller ones as many as show the same images
FULL = 32
LOWEST, HIGHEST = 1e-6, 10.0
AVERAGED = 0.1  # of the steps, as long is the moving average of the loss; so many come first
ENDS_AT = 3.0  # times the lowest smoothed loss: further up there is nothing to see
FALLS = 0.98  # of the first smoothed loss: what a curve must reach to say anything
NEAR = 0.1  # of the fall: on easy data a normalised network stays at its lowest loss while the rate
# grows a hundredfold, so the first rate that comes so near counts, or a tenth of too much is named
MARGIN = 10.0  # below that rate, where growth and decay already hold each other; of a fifth a small
# network with momentum diverged for one seed of three


@dataclass(frozen=True)
class RangeTest:
    """Rates and smoothed losses, a step each, from where enough losses are averaged; which of them
    first comes near the lowest; the rate to take, and why in words."""

    rates: list[float]
    losses: list[float]
    near: int
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
    steps = STEPS * max(1, FULL // config.batch_size)
    with torch.random.fork_rng(devices):
        trial = Training(
            copy.deepcopy(model).train(),
            quiet,
            total_steps=steps,
            amp_dtype=amp_dtype,
            class_counts=class_counts,
        )
        return read(*_climb(trial, loader))


def _climb(trial: Training, loader: Loader | ResidentLoader) -> tuple[list[float], list[float]]:
    """Rates and smoothed losses, until the loss runs away."""
    rates, losses, average, lowest = [], [], 0.0, math.inf
    steps, done = trial.total_steps, 0
    first = round(AVERAGED * steps)
    kept, growth = 1 - 1 / first, (HIGHEST / LOWEST) ** (1 / (steps - 1))
    with tqdm(total=steps, desc="range test", unit="step", leave=False) as bar:
        epoch = 0
        while done < steps:
            epoch += 1
            with contextlib.closing(loader.epoch(epoch)) as batches:
                for batch in batches:
                    rate = LOWEST * growth**done
                    set_rate(trial.step.optimizer, rate)
                    trial.step.whole = len(batch.indices)
                    loss = trial.step(batch.images, batch.labels)[0].item()
                    done += 1
                    average = kept * average + (1 - kept) * loss
                    smooth = average / (1 - kept**done)
                    if not math.isfinite(loss) or smooth > ENDS_AT * lowest:
                        return rates, losses
                    bar.update()
                    if done >= first:  # the average of fewer is low or high by luck
                        lowest = min(lowest, smooth)
                        rates.append(rate)
                        losses.append(smooth)
                    if done == steps:
                        break
    return rates, losses


def read(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """What a curve of smoothed losses suggests. Raises UsageError where it never falls."""
    best = int(np.argmin(losses)) if losses else 0
    if not losses or losses[best] > FALLS * losses[0]:
        raise UsageError(
            f"no learning rate from {LOWEST:g} to {HIGHEST:g} lowers the loss: look at the data, "
            "--init and --act first, or give a number to --lr"
        )
    near = losses[best] + NEAR * (losses[0] - losses[best])
    first = next(number for number, loss in enumerate(losses) if loss <= near)
    suggestion = float(f"{rates[first] / MARGIN:.1g}")
    reason = (
        f"the smoothed loss falls from {losses[0]:.3g} to {losses[best]:.3g} and is nearly there, "
        f"{losses[first]:.3g}, at a rate of {rates[first]:.2g}; a {MARGIN:.0f}th of it keeps a "
        "distance from where it turns up"
    )
    return RangeTest(list(rates), list(losses), first, suggestion, reason)


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
    axes.plot(found.rates[found.near], found.losses[found.near], "o", ms=6, mfc="none", color=SOFT)
    axes.set_xscale("log")
    return png(figure)


def announce(found: RangeTest, path: Path) -> None:
    """Write the picture to `path` and say what was found. Raises DiskError."""
    write_atomically(path, picture(found))
    print(f"learning rate: {found.suggestion:g} ({found.reason}); curve: {path}")

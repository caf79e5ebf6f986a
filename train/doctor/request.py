"""What is only done on request: a training of its own, and the comparison of several runs."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import trange

from models import build_model
from train.config import OptimConfig, from_dict
from train.data.loader import Batch
from train.doctor.material import probe_batch
from train.doctor.signals import FILE, Signals
from train.doctor.trial import range_of
from train.environment import choose_device, prepare
from train.inputs import load_inputs
from train.training import Training

IMAGES = 16
STEPS = 200


def try_one_batch(signals: Signals) -> None:
    """Train a fresh network of a run on a few of its images and add what came of it to its
    `signals`. Raises DataError when the photos are not there any more."""
    config = from_dict(signals.start["config"], FILE)
    device = choose_device(config.run.device)
    prepare(config.run)
    batch = probe_batch(load_inputs(config), config, torch.float32, device)
    torch.manual_seed(config.run.seed)
    options = asdict(config.model)
    model = build_model(options.pop("model"), len(signals.start["classes"]), **options)
    signals.add(learn_by_heart(model.to(device), config.optim, batch))


def try_range(signals: Signals) -> None:
    """Look for the learning rate that a run's network takes and add it to its `signals`.

    Raises DataError when the photos are not there any more, UsageError where no rate lowers the
    loss.
    """
    config = from_dict(signals.start["config"], FILE)
    device = choose_device(config.run.device)
    prepare(config.run)
    found = range_of(load_inputs(config), config, device)
    signals.add({"kind": "range_test", "suggestion": found.suggestion})


def learn_by_heart(model: nn.Module, config: OptimConfig, batch: Batch) -> dict[str, Any]:
    """The one_batch record: `model` learns the first IMAGES of `batch` with the optimizer and the
    learning rate of `config`, without all that makes learning by heart harder."""
    eased = replace(config, schedule="constant", ema=0.0, label_smoothing=0.0, weight_decay=0.0)
    training = Training(model.train(), eased, total_steps=STEPS, amp_dtype=None)
    few = Batch(*(tensor[:IMAGES] for tensor in batch))
    losses = []
    for number in trange(1, STEPS + 1, desc="learning one batch", leave=False):
        step = training.finish(training.train_step(few, 1, number))
        losses.append(step.loss)
    return {
        "kind": "one_batch",
        "images": step.images,
        "steps": STEPS,
        "accuracy": step.correct / step.images,
        "first_loss": losses[0],
        "loss": losses[-1],
    }


def compare_depth(runs: Mapping[Path, Signals]) -> None:
    """Add to every run of a plain network the final training losses of all `runs` that differ from
    it by their seed alone, and of those that differ by their shortcuts."""
    losses: dict[tuple[str, str], list[float]] = {}
    for signals in runs.values():
        if signals.epochs and signals.epochs[-1]["train_loss"] is not None:
            losses.setdefault(_kind(signals), []).append(signals.epochs[-1]["train_loss"])
    for signals in runs.values():
        model, rest = _kind(signals)
        residual = model.replace("plain", "resnet")
        if residual != model and (residual, rest) in losses:
            signals.add(
                {
                    "kind": "degradation",
                    "plain": losses[model, rest],
                    "residual": losses[residual, rest],
                    "residual_model": residual,
                }
            )


def _kind(signals: Signals) -> tuple[str, str]:
    """A run's model, and everything else about it but its seed and its folder."""
    config = copy.deepcopy(signals.start["config"])
    for name in ("seed", "out", "resume", "threads", "debug"):
        del config["run"][name]
    return config["model"].pop("model"), str(config)

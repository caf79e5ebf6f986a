"""Figures that several rules share, each from the recorded signals alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.doctor.signals import Signals

SURE = 2.5  # standard errors: of a slope over six epochs, one in forty by chance
WINDOW = 20  # steps over which noisy losses are averaged: the fewest that give a steady median


def log_classes(signals: Signals) -> float:
    """ln K: the loss of a network that knows nothing."""
    return math.log(max(2, len(signals.start["classes"])))


def shares(signals: Signals) -> np.ndarray:
    """float64 [K]: how often the training shows each class."""
    counts = np.array(signals.start["train_counts"], dtype=float)
    if signals.config("data", "sampler") == "balanced":
        counts = (counts > 0).astype(float)
    return counts / max(1.0, counts.sum())


def majority(signals: Signals) -> float:
    """The accuracy of always naming the class that the training shows most often."""
    return float(shares(signals).max())


def window(signals: Signals) -> int:
    """The latest steps that count as now: a tenth of those recorded, and no fewer than WINDOW."""
    return max(WINDOW, signals.steps // 10)


def learnt(signals: Signals) -> bool:
    """Whether the latest steps show that anything has been learnt: an accuracy more than three
    standard errors above always naming the largest class, or a loss more than 5 % below that of
    the class frequencies."""
    steps = window(signals)
    images = steps * signals.start["batch_size"]
    share = majority(signals)
    accuracy = np.nanmean(_tail(signals.per_step("accuracy"), steps))
    if accuracy > share + 3 * math.sqrt(share * (1 - share) / images):
        return True
    shown = shares(signals)
    entropy = -(shown[shown > 0] * np.log(shown[shown > 0])).sum()
    return bool(recent_loss(signals) < 0.95 * entropy)


def recent_loss(signals: Signals) -> float:
    """The median loss of the latest steps."""
    return float(np.nanmedian(_tail(signals.per_step("loss"), window(signals))))


def first_loss(signals: Signals) -> float:
    """The median loss of the first WINDOW steps."""
    return float(np.nanmedian(signals.per_step("loss")[:WINDOW]))


def _tail(values: np.ndarray, count: int) -> np.ndarray:
    tail = values[-count:]
    return tail if np.isfinite(tail).any() else np.array([math.inf])


def full_rate(signals: Signals, epochs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the epochs in which the learning rate was at least a tenth of the run's highest: at
    the end of a decay everything stands still, and is healthy."""
    rates = signals.per_step("learning_rate")
    if not rates.size:
        return []
    highest = rates.max()
    return [e for e in epochs if rates[min(e["step"], rates.size) - 1] >= 0.1 * highest]


def flat(losses: Sequence[float], least: float = 0.01, sure: float = SURE) -> bool:
    """Whether a loss an epoch stands still: a line through it falls by less than `least` of its
    height an epoch, and not by more than `sure` standard errors of its slope."""
    values = np.array(losses, dtype=float)
    place = np.arange(values.size) - (values.size - 1) / 2
    spread = (place**2).sum()
    slope = float((place * values).sum() / spread)
    rest = values - values.mean() - slope * place
    error = math.sqrt(float((rest**2).sum()) / max(1, values.size - 2) / spread)
    return -slope < least * values.mean() and -slope <= sure * error


def share_error(share: float, images: int) -> float:
    """Standard error of an accuracy, with one success and failure more, so that it is never 0
    (Agresti and Coull 1998)."""
    smoothed = (share * images + 1) / (images + 2)
    return math.sqrt(smoothed * (1 - smoothed) / (images + 2))


def train_accuracy(signals: Signals, epoch: Mapping[str, Any]) -> tuple[float, int]:
    """The accuracy on training images at the end of an epoch, and how many it was measured on.

    The doctor's own images, unaugmented and in eval mode, where the last probe is not older than
    two epochs; the epoch's running accuracy where that is higher or all there is. It is measured
    on augmented images while the weights move, so it errs on the low side.
    """
    running = epoch.get("train_accuracy") or 0.0
    images = sum(signals.start["train_counts"])
    per_epoch = signals.start["steps_per_epoch"]
    near = [
        p for p in signals.probes if epoch["step"] - 2 * per_epoch <= p["step"] <= epoch["step"]
    ]
    if near and (near[-1]["clean_accuracy"] or 0.0) > running:
        return near[-1]["clean_accuracy"], near[-1]["images"]
    return running, images


def run_of(flags: Sequence[bool], length: int) -> int | None:
    """Index at which the latest unbroken run of True begins, if it lasts to the end and is at
    least `length` long."""
    start = len(flags)
    while start > 0 and flags[start - 1]:
        start -= 1
    return start if flags and len(flags) - start >= length else None


def first(flags: Sequence[bool]) -> int | None:
    """Index of the first True."""
    return next((i for i, flag in enumerate(flags) if flag), None)


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve of `scores` [N] for the images marked by bool [N]: the chance that
    one of them scores higher than another image, ties half. None where one side is empty.

    scikit-learn's takes milliseconds a class, which an epoch of a small run does not have."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal scores share their mean rank
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / positives / negatives)


def short(value: float) -> float:
    """A setting to two digits, as one would type it."""
    return float(f"{value:.2g}")

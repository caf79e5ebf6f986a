"""What predictions are worth, in numbers with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.metrics import roc_auc_score

Z = 1.959963984540054  # standard deviations of a 95 % interval
BINS = 10  # of confidence, in the calibration curve

Interval = tuple[float, float]


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature) in float64: [N, K]."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    powers = np.exp(scaled)
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature under which the labels [N] of `logits` [N, K] are most likely (Guo et al.
    2017), between 1/20 and 20.

    The target of the true class is (N + 1) / (N + K), not 1 (after Platt 1999): N photos that are
    all classified right do not make a network infinitely sure.
    """
    n, classes = logits.shape
    targets = np.full((n, classes), 1 / (n + classes))
    targets[np.arange(n), labels] += n / (n + classes)

    def loss(log_temperature: float) -> float:
        found = probabilities(logits, math.exp(log_temperature))
        return -(targets * np.log(found.clip(1e-30))).sum() / n

    bound = math.log(20)
    return math.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x)


def wilson(successes: float, trials: float) -> Interval:
    """The 95 % Wilson score interval of a proportion (Wilson 1927), as fractions 0..1."""
    share, spread = successes / trials, Z**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def share_interval(hits: np.ndarray, pictures: np.ndarray, among: np.ndarray) -> Interval | None:
    """Wilson's interval of the share of bool `hits` [N] within bool `among` [N], with as many
    trials as there are different `pictures` [N] in it; None where it is empty."""
    if not among.any():
        return None
    trials = len(np.unique(pictures[among]))
    return wilson(float(hits[among].mean()) * trials, trials)


def auc_interval(auc: float, positives: int, negatives: int) -> Interval:
    """The 95 % interval of an area under the ROC curve (Hanley and McNeil 1982), within 0..1."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    half = Z * math.sqrt(max(variance, 0) / (positives * negatives))
    return max(0.0, auc - half), min(1.0, auc + half)


@dataclass(frozen=True)
class ClassScore:
    """One class against the rest, each with its 95 % interval; None where it does not exist:
    precision without predictions, recall without photos, the area under the ROC curve without
    positives or negatives, or where only counts are known."""

    images: int
    precision: float | None
    recall: float | None
    f1: float | None
    auc: float | None
    precision_interval: Interval | None = None
    recall_interval: Interval | None = None
    f1_interval: Interval | None = None
    auc_interval: Interval | None = None


@dataclass(frozen=True)
class Bin:
    """Predictions whose confidence lies in one tenth: how many, how sure, how often right."""

    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Scores:
    """What a set of predictions is worth. confusion: int64 [true class, predicted class]."""

    images: int
    accuracy: float
    accuracy_interval: Interval
    loss: float
    macro_f1: float
    confusion: np.ndarray
    per_class: tuple[ClassScore, ...]
    calibration: tuple[Bin, ...]
    calibration_error: float


def score(
    probability: np.ndarray, labels: np.ndarray, pictures: np.ndarray | None = None
) -> Scores:
    """Scores of `probability` [N, K] for the true classes `labels` int64 [N], N > 0.

    pictures: [N], equal for photos of one picture, of which the intervals count one; by default all
    differ. A class without predictions or photos counts 0 in macro_f1.
    """
    n, classes = probability.shape
    pictures = np.arange(n) if pictures is None else pictures
    predicted = probability.argmax(axis=1)
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2)
    confusion = confusion.reshape(classes, classes)
    right, everything = predicted == labels, np.ones(n, bool)
    per_class = tuple(
        _class_score(probability[:, k], labels == k, predicted == k, pictures)
        for k in range(classes)
    )
    bins, error = calibration(probability, labels)
    return Scores(
        images=n,
        accuracy=float(right.mean()),
        accuracy_interval=share_interval(right, pictures, everything),
        loss=float(-np.log(probability[np.arange(n), labels].clip(1e-30)).mean()),
        macro_f1=float(np.mean([one.f1 or 0.0 for one in per_class])),
        confusion=confusion,
        per_class=per_class,
        calibration=bins,
        calibration_error=error,
    )


def count_scores(confusion: np.ndarray) -> tuple[ClassScore, ...]:
    """What counts [true class, predicted class] alone say of each class, without intervals."""
    columns = zip(confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0), strict=True)
    return tuple(_counted(*map(int, column)) for column in columns)


def _counted(hits: int, images: int, predicted: int) -> ClassScore:
    return ClassScore(
        images=images,
        precision=hits / predicted if predicted else None,
        recall=hits / images if images else None,
        f1=2 * hits / (images + predicted) if images + predicted else None,
        auc=None,
    )


def _class_score(
    probability: np.ndarray, true: np.ndarray, named: np.ndarray, pictures: np.ndarray
) -> ClassScore:
    """probability [N] of the class; bool [N]: it is the class, it was named; pictures [N]."""
    hits = true & named
    values = {
        "precision_interval": share_interval(hits, pictures, named),
        "recall_interval": share_interval(hits, pictures, true),
    }
    # F1 = 2 J / (1 + J) grows with J, the share of hits among photos of the class or named so
    if jaccard := share_interval(hits, pictures, true | named):
        values["f1_interval"] = tuple(2 * bound / (1 + bound) for bound in jaccard)
    if true.any() and not true.all():
        values["auc"] = float(roc_auc_score(true, probability))
        counts = (len(np.unique(pictures[side])) for side in (true, ~true))
        values["auc_interval"] = auc_interval(values["auc"], *counts)
    return replace(_counted(int(hits.sum()), int(true.sum()), int(named.sum())), **values)


def calibration(probability: np.ndarray, labels: np.ndarray) -> tuple[tuple[Bin, ...], float]:
    """The bins of the calibration curve, those that hold predictions, and the expected calibration
    error: the mean distance of confidence and accuracy over them, weighed by their images (Naeini
    et al. 2015). probability [N, K], labels int64 [N]."""
    confidence, right = probability.max(axis=1), probability.argmax(axis=1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    chosen = (place == number for number in range(BINS))
    bins = tuple(
        Bin(int(mask.sum()), float(confidence[mask].mean()), float(right[mask].mean()))
        for mask in chosen
        if mask.any()
    )
    return bins, sum(b.images * abs(b.confidence - b.accuracy) for b in bins) / len(labels)


def as_json(scores: Scores, classes: Sequence[str]) -> dict[str, object]:
    """The scores under the names of their fields, those of a class under its name."""
    values = {**vars(scores), "confusion": scores.confusion.tolist(), "classes": list(classes)}
    named = zip(classes, scores.per_class, strict=True)
    values["per_class"] = {label: vars(one) for label, one in named}
    values["calibration"] = [vars(one) for one in scores.calibration]
    return values

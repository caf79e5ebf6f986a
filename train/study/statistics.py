"""Intervals and tests for comparing trained networks. All intervals are 95 %, all tests two-sided.

Runs that differ in their seed also differ in their split, and their training sets overlap, so their
results vary less than those of independent samples would. Nadeau and Bengio ("Inference for the
generalization error", 2003) correct the variance of the mean from s^2 / n to
s^2 (1 / n + n_val / n_train); `overlap` below is that n_val / n_train, and 0 is the plain t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from train.metrics import share_interval

LEVEL = 0.95
DRAWS, FEWEST = 2000, 200  # of a bootstrap; of large sets fewer, which vary less
MOST_WEIGHTS = 20_000_000  # 160 MB


@dataclass(frozen=True)
class Mean:
    """A mean of n runs and its t interval; low, high and p (of the mean being 0) are None for a
    single run, and p also where nothing varies."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    n: int


def t_mean(values: Sequence[float], overlap: float = 0.0) -> Mean:
    """Mean of `values` with Student's t interval, corrected for `overlap` (Nadeau and Bengio)."""
    values = np.asarray(values, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Mean(mean, None, None, None, n)
    error = float(values.std(ddof=1)) * math.sqrt(1 / n + overlap)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else None
    return Mean(mean, mean - half, mean + half, p, n)


def mcnemar(first_only: int, second_only: int) -> float:
    """p of the exact McNemar test (1947): of the photos that only one of two networks knows, are
    more known to one of them than chance would give?"""
    total = first_only + second_only
    return float(stats.binomtest(first_only, total).pvalue) if total else 1.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p-values adjusted for how many there are (Holm 1979); None stays None."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = highest
    return adjusted


def bootstrap_weights(clusters: np.ndarray, seed: int = 0) -> np.ndarray:
    """int64 [draws, N]: how often each of N rows is drawn when whole clusters (int [N], such as all
    photos of a picture, or all predictions for it) are drawn with replacement."""
    _, place = np.unique(clusters, return_inverse=True)
    count = int(place.max()) + 1
    draws = max(FEWEST, min(DRAWS, MOST_WEIGHTS // len(clusters)))
    chosen = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return chosen[:, place]


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of the finite bootstrap `values` (Efron 1979); None where there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of `values` [N] under each row of `weights` [draws, N]: [draws]."""
    return _ratio(weights @ values.astype(np.float64), weights.sum(axis=1))


def weighted_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of `scores` [N] for bool `positive` [N] under each row of `weights`
    [draws, N]: the share of (positive, negative) pairs in the right order, ties half. NaN where a
    side is empty."""
    order = np.argsort(scores, kind="stable")
    scores, positive, weights = scores[order], positive[order], weights[:, order].astype(np.float64)
    negatives = np.where(positive, 0, weights)
    below = np.concatenate([np.zeros((len(weights), 1)), negatives.cumsum(axis=1)], axis=1)
    first = np.searchsorted(scores, scores, side="left")
    after = np.searchsorted(scores, scores, side="right")
    pairs = (np.where(positive, weights, 0) * (below[:, first] + below[:, after]) / 2).sum(axis=1)
    return _ratio(pairs, np.where(positive, weights, 0).sum(axis=1) * below[:, -1])


def class_intervals(
    probability: np.ndarray, labels: np.ndarray, clusters: np.ndarray, runs: np.ndarray
) -> list[dict[str, tuple[float, float] | None]]:
    """For each class the interval of precision and recall (Wilson's, with as many trials as there
    are different clusters among the photos) and of f1 and auc (a bootstrap over clusters).

    probability [N, K], labels int64 [N] in 0..K-1, clusters [N], runs int [N]: which network said
    it. Counts are pooled over the runs, the area is the mean over runs.
    """
    weights, predicted = bootstrap_weights(clusters), probability.argmax(axis=1)
    found = []
    for k in range(probability.shape[1]):
        true, named = labels == k, predicted == k
        hits, images, count = (
            weights @ mask.astype(np.int64) for mask in (true & named, true, named)
        )
        areas = [
            weighted_auc(probability[runs == r, k], true[runs == r], weights[:, runs == r])
            for r in np.unique(runs)
        ]
        found.append(
            {
                "precision": share_interval(true, clusters, named),
                "recall": share_interval(named, clusters, true),
                "f1": percentile_interval(_ratio(2 * hits, images + count)),
                "auc": percentile_interval(np.mean(areas, axis=0)),
            }
        )
    return found


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)

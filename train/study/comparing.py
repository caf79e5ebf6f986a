"""What may be concluded from the runs of a study, of one model and of two compared."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train import metrics
from train.study.results import COSTS, OUTCOMES, Run
from train.study.statistics import (
    LEVEL,
    Mean,
    bootstrap_weights,
    class_intervals,
    holm,
    mcnemar,
    percentile_interval,
    t_mean,
    weighted_mean,
)
from train.validation import Validation


def overlap_of(runs: Sequence[Run]) -> float:
    """n_val / n_train where the splits differ; 0 where all runs share one split, and only their
    training differs."""
    splits = {(run.folder / "split.csv").read_bytes() for run in runs}
    if len(splits) < 2:
        return 0.0
    sizes = [run.summary["split"] for run in runs]
    return sum(s["validation"] for s in sizes) / sum(s["train"] for s in sizes)


def model_statistics(runs: Sequence[Run]) -> dict[str, Any]:
    """All figures of one model from its finished runs; shares are 0..1."""
    overlap = overlap_of(runs)
    values: dict[str, Any] = {"runs": [run.name for run in runs], "overlap": overlap}
    for name in (*OUTCOMES, *COSTS):
        found = [run.value(name) for run in runs]
        if None not in found:
            values[name] = t_mean(found, overlap if name in OUTCOMES else 0.0)
    values["parameters"] = runs[0].summary["parameters"]
    checked = [run.validation for run in runs]
    if None not in checked:
        values["classes"] = _class_statistics(checked)
    return values


def _class_statistics(checked: Sequence[Validation]) -> dict[str, Any]:
    probability = np.concatenate([one.probability for one in checked])
    labels = np.concatenate([one.labels for one in checked])
    pictures = np.concatenate([one.pictures for one in checked])
    runs = np.repeat(np.arange(len(checked)), [len(one.labels) for one in checked])
    pooled = metrics.score(probability, labels)
    areas = [
        [c.auc for c in metrics.score(one.probability, one.labels).per_class] for one in checked
    ]
    intervals = class_intervals(probability, labels, pictures, runs)
    per_class = {}
    for k, (name, one, spread) in enumerate(
        zip(checked[0].classes, pooled.per_class, intervals, strict=True)
    ):
        known = [row[k] for row in areas if row[k] is not None]
        per_class[name] = {
            "images": one.images,
            "precision": one.precision,
            "recall": one.recall,
            "f1": one.f1,
            "auc": float(np.mean(known)) if known else None,
            "intervals": spread,
        }
    return {
        "per_class": per_class,
        "macro_f1": pooled.macro_f1,
        "confusion": pooled.confusion.tolist(),
        "calibration": [vars(one) for one in pooled.calibration],
        "calibration_error": pooled.calibration_error,
    }


def standard_error(runs: Sequence[Run]) -> dict[str, float] | None:
    """What chance does to one validation: the standard error of the best accuracy, as a share, for
    as many different pictures as a validation set has."""
    checked = [run.validation for run in runs]
    if not checked or None in checked:
        return None
    pictures = float(np.mean([len(np.unique(one.pictures)) for one in checked]))
    accuracy = float(np.mean([one.right.mean() for one in checked]))
    error = (accuracy * (1 - accuracy) / pictures) ** 0.5
    photos = float(np.mean([len(one.labels) for one in checked]))
    return {"photos": photos, "pictures": pictures, "accuracy": accuracy, "error": error}


def compare(first: Sequence[Run], second: Sequence[Run]) -> dict[str, Any] | None:
    """The second model against the first over the pairs that share a split; None without any.

    Each outcome as second minus first; the photos of best.pt by McNemar's test, a photo a picture,
    and by a bootstrap over pictures.
    """
    others = {run.pair: run for run in second}
    pairs = [(run, others[run.pair]) for run in first if run.pair in others]
    pairs = [(a, b) for a, b in pairs if _same_split(a, b)]
    if not pairs:
        return None
    overlap = overlap_of([a for a, _ in pairs])
    values: dict[str, Any] = {
        "first": pairs[0][0].model,
        "second": pairs[0][1].model,
        "pairs": [a.pair for a, _ in pairs],
        "overlap": overlap,
    }
    for name in OUTCOMES:
        found = [(a.value(name), b.value(name)) for a, b in pairs]
        if not any(None in both for both in found):
            values[name] = t_mean([b - a for a, b in found], overlap)
    checked = [(a.validation, b.validation) for a, b in pairs]
    if not any(None in both for both in checked):
        values["photos"] = compare_photos(checked)
    return values


def _same_split(a: Run, b: Run) -> bool:
    return (a.folder / "split.csv").read_bytes() == (b.folder / "split.csv").read_bytes()


def compare_photos(checked: Sequence[tuple[Validation, Validation]]) -> dict[str, Any]:
    """Pairs of networks on the same photos: of each pair McNemar's test, a photo a picture; over
    all the mean gain of the second as a share, with its bootstrap interval over pictures."""
    tests, gains, pictures = [], [], []
    for a, b in checked:
        _, firsts = np.unique(a.pictures, return_index=True)
        only_first = int((a.right & ~b.right)[firsts].sum())
        only_second = int((b.right & ~a.right)[firsts].sum())
        tests.append(
            {
                "pictures": len(firsts),
                "only_first": only_first,
                "only_second": only_second,
                "p": mcnemar(only_first, only_second),
            }
        )
        gains.append(b.right.astype(np.int64) - a.right)
        pictures.append(a.pictures)
    gain = np.concatenate(gains)
    drawn = weighted_mean(gain, bootstrap_weights(np.concatenate(pictures)))
    low, high = percentile_interval(drawn)
    return {"mcnemar": tests, "mean": float(gain.mean()), "low": low, "high": high}


def comparisons(by_model: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Every plain network against its residual one, and every modified network against the one it
    modifies, or else the study's first model; with Holm's p over all of them."""
    found = []
    for second in by_model:
        first = reference_of(second, list(by_model))
        values = first and compare(by_model[first], by_model[second])
        if values:
            found.append(values)
    adjusted = holm([_p(one) for one in found])
    return [
        one | {"p_holm": p, "verdict": verdict(one, p)}
        for one, p in zip(found, adjusted, strict=True)
    ]


def reference_of(model: str, models: Sequence[str]) -> str | None:
    """What a model is compared with: without its last modification, plain for residual, or the
    first model; None for the first itself."""
    name = model
    while "+" in name:
        name = name.rpartition("+")[0]
        if name in models:
            return name
    plain = name.replace("resnet", "plain")
    if name == model and plain != model and plain in models:
        return plain
    return models[0] if model != models[0] else None


def _p(comparison: Mapping[str, Any]) -> float | None:
    mean: Mean | None = comparison.get("best_val_accuracy")
    return mean.p if mean else None


def verdict(comparison: Mapping[str, Any], p: float | None) -> str:
    """better or worse where the t test over the runs says so; ahead or behind where only the
    photos of these runs say so, and too few or too different runs stand behind them; none where no
    difference is shown; unknown without validation."""
    mean: Mean | None = comparison.get("best_val_accuracy")
    if mean is None:
        return "unknown"
    if p is not None and p < 1 - LEVEL:
        return "better" if mean.value > 0 else "worse"
    photos = comparison.get("photos")
    if photos and (photos["low"] > 0 or photos["high"] < 0):
        return "ahead" if photos["mean"] > 0 else "behind"
    return "none"

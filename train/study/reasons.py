"""The course report's three reasons why shortcuts help, each with a measurement of the runs.

1. Gradients have a path to the early layers: the gradient of the first stage over that of the last,
   larger in the residual network than in the plain one.
2. Learning F(x) = H(x) - x is easier, for the identity is F = 0: the trained residual blocks are
   nearer to the identity.
3. The degradation problem goes away: the residual network ends with the lower training loss.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.study.comparing import compare, overlap_of
from train.study.results import Run
from train.study.statistics import Mean, t_mean

MOMENTS = ("start", "best", "last")


def moments(run: Run) -> dict[str, Mapping[str, Any]]:
    """What measures.json has of the weights at the start, in the best and in the last epoch; empty
    where one is missing."""
    depth = {one["epoch"]: one for one in run.measures.get("depth", ())}
    if not depth:
        return {}
    epochs = (0, run.summary["best_epoch"] or max(depth), max(depth))
    if not depth.keys() >= set(epochs):
        return {}
    return {name: depth[epoch] for name, epoch in zip(MOMENTS, epochs, strict=True)}


def by_depth(runs: Sequence[Run], moment: str, name: str) -> list[float | None]:
    """The mean over runs of `name` for each block; None where the blocks have none."""
    rows = [[block[name] for block in moments(run)[moment]["blocks"]] for run in runs]
    return [
        None if None in column else float(np.mean(column)) for column in zip(*rows, strict=True)
    ]


def block_names(run: Run) -> list[str]:
    return [block["name"] for block in moments(run)["start"]["blocks"]]


def gradient_reach(measured: Mapping[str, Any]) -> float:
    """Natural logarithm of the mean gradient norm of the first stage's blocks over that of the last
    stage's, both geometric: below 0 where gradients vanish towards the input."""
    logs = {"layer1": [], "layer4": []}
    for block in measured["blocks"]:
        stage = block["name"].partition(".")[0]
        if stage in logs:
            logs[stage].append(math.log(max(block["gradient_norm"], 1e-30)))
    return float(np.mean(logs["layer1"]) - np.mean(logs["layer4"]))


def identity_distance(measured: Mapping[str, Any]) -> float | None:
    """The mean over blocks; None where every block changes the shape."""
    found = [block["identity_distance"] for block in measured["blocks"]]
    found = [distance for distance in found if distance is not None]
    return float(np.mean(found)) if found else None


def reasons(plain: Sequence[Run], residual: Sequence[Run]) -> dict[str, Any]:
    """For each of gradients, identity and degradation: shown (bool), the residual minus the plain
    network's value as a `Mean`, and each network's own; None where it was not measured."""
    others = {run.pair: run for run in residual}
    pairs = [(run, others[run.pair]) for run in plain if run.pair in others]
    pairs = [(a, b) for a, b in pairs if moments(a) and moments(b)]
    found: dict[str, Any] = dict.fromkeys(("gradients", "identity", "degradation"))
    if pairs:
        overlap = overlap_of([a for a, _ in pairs])
        reach = [[_mean_reach(run) for run in pair] for pair in pairs]
        found["gradients"] = _reason(reach, overlap, sign=1)
        apart = [[identity_distance(moments(run)["last"]) for run in pair] for pair in pairs]
        if not any(None in both for both in apart):
            found["identity"] = _reason(apart, overlap, sign=-1)
    compared = compare(plain, residual)
    if compared and "final_train_loss" in compared:
        ends = [[run.value("final_train_loss") for run in runs] for runs in (plain, residual)]
        difference = compared["final_train_loss"]
        found["degradation"] = {
            "plain": float(np.mean(ends[0])),
            "residual": float(np.mean(ends[1])),
            "difference": difference,
            "shown": _is_shown(difference, -1),
        }
    return found


def _mean_reach(run: Run) -> float:
    return float(np.mean([gradient_reach(one) for one in moments(run).values()]))


def _reason(values: Sequence[Sequence[float]], overlap: float, sign: int) -> dict[str, Any]:
    difference = t_mean([b - a for a, b in values], overlap)
    plain, residual = np.mean(values, axis=0)
    return {
        "plain": float(plain),
        "residual": float(residual),
        "difference": difference,
        "shown": _is_shown(difference, sign),
    }


def _is_shown(difference: Mean, sign: int) -> bool:
    """Whether the whole interval lies on the claimed side of 0."""
    if difference.low is None:
        return False
    return difference.low > 0 if sign > 0 else difference.high < 0

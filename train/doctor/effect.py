"""What a remedy brought, as `--try` measured it: pairs of trainings, and what they say together."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import t

from train.doctor.signals import Signals

LOSS = "loss on clean training photos"


@dataclass(frozen=True)
class Effect:
    """What a remedy changed: `measure` of each pair of trainings, without it and with it, by seed;
    the mean difference and its 95 % interval (paired t)."""

    measure: str
    without: Sequence[float]
    with_it: Sequence[float]
    difference: float
    low: float
    high: float

    @property
    def helps(self) -> bool:
        """Whether the whole interval is on the better side."""
        return self.high < 0 if self.measure == LOSS else self.low > 0

    @property
    def harms(self) -> bool:
        return self.low > 0 if self.measure == LOSS else self.high < 0

    def told(self) -> str:
        """The effect in a sentence."""
        verdict = "no effect shown: the interval holds 0"
        if self.helps:
            verdict = "the remedy helps"
        elif self.harms:
            verdict = "the remedy makes it worse"
        return (
            f"{self.measure}: {np.mean(self.without):.3f} without, {np.mean(self.with_it):.3f} "
            f"with the remedy, difference {self.difference:+.3f} (95 % interval {self.low:+.3f} to "
            f"{self.high:+.3f}, {len(self.without)} paired seeds): {verdict}"
        )

    def record(self, rule: str, command: str, epochs: int) -> dict[str, Any]:
        """The line of signals.jsonl that keeps it; `epochs` of each training."""
        return {
            "kind": "effect",
            "rule": rule,
            "command": command,
            "epochs": epochs,
            **asdict(self),
            "text": self.told(),
        }


def compare(measure: str, without: Sequence[float], with_it: Sequence[float]) -> Effect:
    """The effect over pairs of trainings, at least two: Student's t on their differences."""
    differences = np.subtract(with_it, without)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    half = float(t.ppf(0.975, len(differences) - 1)) * error
    return Effect(measure, without, with_it, mean, mean - half, mean + half)


def effect_on(signals: Signals, rule: str, command: str | None) -> dict[str, Any] | None:
    """What was measured of a rule's remedy on this run, without what names it; None where this
    command was not tried."""
    tried = signals.others.get("effect")
    if command is None or tried is None or (tried["rule"], tried["command"]) != (rule, command):
        return None
    return {key: tried[key] for key in tried if key not in ("kind", "rule", "command")}

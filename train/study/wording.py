"""Numbers and findings as words of one language."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from train.page import percent
from train.study.findings import Findings
from train.study.results import COSTS
from train.study.statistics import Mean
from train.study.texts import TEXTS

DASH, MINUS, SPACE = "\u2013", "\u2212", "\u00a0"
REASONS = ("gradients", "identity", "degradation")
# of a cost: what it is divided by, and its format
COST_FORMATS = {
    "flops": (1e9, ".3g"),
    "images_per_second": (1, ",.1f"),
    "training_seconds": (1, ",.1f"),
    "peak_memory_bytes": (1e6, ",.0f"),
}


class Wording:
    """Texts and number formats of a language; an empty string stands for what is not known."""

    def __init__(self, language: str):
        self.language = language
        self._texts = TEXTS[language]

    def say(self, key: str, **values: object) -> str:
        return self._texts[key].format(**values)

    def say_all(self, *keys: str) -> list[str]:
        return [self.say(key) for key in keys]

    def span(self, low: float | None, high: float | None, digits: int) -> str:
        if low is None:
            return ""
        return _minus(f"{low:.{digits}f} {self.say('to')} {high:.{digits}f}")

    def point_span(self, low: float | None, high: float | None) -> str:
        """In points; a t interval of two runs may leave what is possible, and is cut there."""
        return "" if low is None else self.span(max(-100, 100 * low), min(100, 100 * high), 1)

    def number(self, name: str, value: float | None) -> str:
        """An outcome or a cost."""
        if value is None:
            return ""
        if name.endswith("accuracy"):
            return percent(value)
        scale, form = COST_FORMATS.get(name, (1, ".3f"))
        return f"{value / scale:{form}}"

    def interval(self, name: str, mean: Mean | None) -> str:
        """That of an outcome."""
        if mean is None or mean.low is None:
            return ""
        low = max(0.0, mean.low)
        if name.endswith("accuracy"):
            return self.point_span(low, mean.high) + f"{SPACE}%"
        return self.span(low, mean.high, 3)

    def with_interval(self, name: str, mean: Mean | None) -> str:
        if mean is None:
            return ""
        interval = "" if name in COSTS else self.interval(name, mean)
        return self.number(name, mean.value) + (f" ({interval})" if interval else "")

    def difference(self, name: str, value: float) -> str:
        if name.endswith("accuracy"):
            return f"{points(value)} {self.say('points')}"
        return _minus(f"{value:+.3f}")

    def difference_interval(self, name: str, mean: Mean) -> str:
        if name.endswith("accuracy"):
            return self.point_span(mean.low, mean.high)
        return self.span(mean.low, mean.high, 3)

    def share_of_class(self, value: float | None, interval: Sequence[float] | None) -> str:
        """Precision or recall in per cent."""
        if value is None:
            return ""
        return percent(value) + (f" ({self.point_span(*interval)})" if interval else "")

    def score_of_class(self, value: float | None, interval: Sequence[float] | None) -> str:
        """F1 or an area."""
        if value is None:
            return ""
        return f"{value:.3f}" + (f" ({self.span(*interval, 3)})" if interval else "")

    def finding(self, one: Mapping[str, Any]) -> str:
        """A comparison as a sentence."""
        names = {"first": label(one["first"]), "second": label(one["second"])}
        mean: Mean | None = one.get("best_val_accuracy")
        if mean is None:
            return self.say("say_unknown", **names)
        interval, photos = self.point_span(mean.low, mean.high), one.get("photos")
        over = self.say("over_one")
        if mean.low is not None:
            over = self.say("over_runs", n=mean.n, interval=interval)
        return self.say(
            f"say_{one['verdict']}",
            **names,
            difference=points(mean.value),
            interval=interval,
            p=p_value(one["p_holm"]),
            n=mean.n,
            over=over,
            photos=self.point_span(photos["low"], photos["high"]) if photos else DASH,
        )

    def reason(self, found: Findings, name: str) -> str:
        """One of the report's three reasons with its measurement."""
        one = found.reasons[name]
        if one is None:
            return self.say("reason_missing", number=REASONS.index(name) + 1)
        difference: Mean = one["difference"]
        verdict = self.say("reason_single")
        if difference.low is not None:
            span = self.span(difference.low, difference.high, 2)
            interval = f"{_minus(f'{difference.value:+.2f}')} ({span})"
            if name == "gradients":
                interval += f" {self.say('log_unit')}"
            beyond = difference.low > 0 or difference.high < 0
            key = "shown" if one["shown"] else "opposite" if beyond else "not"
            verdict = self.say(f"reason_{key}", interval=interval)
        scale = math.exp if name == "gradients" else float
        first, second = map(label, found.base)
        values = {who: scale(one[who]) for who in ("plain", "residual")}
        return self.say(name, verdict=verdict, first=first, second=second, **values)


def label(model: str) -> str:
    """`resnet34+se` as the course report writes it: ResNet-34+se."""
    names = {"plain": "Plain", "resnet": "ResNet"}
    return re.sub(r"^(plain|resnet)(\d+)", lambda found: f"{names[found[1]]}-{found[2]}", model)


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return _minus(f"{100 * share:+.1f}")


def relative(value: float, of: float) -> str:
    """A difference as a share of what it starts from."""
    return _minus(f"{100 * value / of:+.1f}{SPACE}%") if of else ""


def p_value(p: float | None) -> str:
    if p is None:
        return DASH
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _minus(text: str) -> str:
    return text.replace("-", MINUS)

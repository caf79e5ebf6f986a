"""What the trainings of the benchmark say of the doctor."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from train.metrics import wilson

AMONG = 3


def score(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares, each with its count and Wilson's 95 % interval, over trainings of one half.

    detected: a PROBLEM in a training with a fault. first: the first PROBLEM names a right cause.
    among: one of its first three findings does. false: a PROBLEM in a sound training.
    """
    faults = [result for result in results if result["causes"]]
    sound = [result for result in results if not result["causes"]]
    told = [result["told"] for result in faults if result["told"] is not None]
    shares = [result["share"] for result in results if result["share"] is not None]
    return {
        "detected": share([bool(_problems(r)) for r in faults]),
        "first": share([_problems(r)[:1] != [] and _right(r, _problems(r)[:1]) for r in faults]),
        "among": share([_right(r, _found(r)[:AMONG]) for r in faults]),
        "false": share([bool(_problems(r)) for r in sound]),
        "false_causes": dict(Counter(rule for r in sound for rule in _problems(r)).most_common()),
        "steps_until_told": median(told) if told else None,
        "overhead": median(shares) if shares else None,
    }


def share(hits: Sequence[bool]) -> dict[str, Any] | None:
    """How many of how many, as a share with its interval; None of nothing."""
    if not hits:
        return None
    low, high = wilson(sum(hits), len(hits))
    return {
        "count": sum(hits),
        "of": len(hits),
        "share": sum(hits) / len(hits),
        "low": low,
        "high": high,
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The scores of both halves and every kind of training, as Markdown."""
    halves = [half for half in ("fixing", "scoring") if any(r["half"] == half for r in results)]
    scores = [score([r for r in results if r["half"] == half]) for half in halves]
    lines = [f"| | {' | '.join(halves)} |", f"|---|{'---|' * len(halves)}"]
    for key, name in (
        ("detected", "faults detected"),
        ("first", "right cause first"),
        ("among", "right cause among three"),
        ("false", "false PROBLEM in sound trainings"),
    ):
        lines.append(f"| {name} | {' | '.join(_spelled(s[key]) for s in scores)} |")
    for key, name, form in (
        ("steps_until_told", "steps until told (median)", "{:.0f}"),
        ("overhead", "doctor's time, probing every 10 steps (median)", "{:.0%} of the steps'"),
    ):
        row = ["-" if s[key] is None else form.format(s[key]) for s in scores]
        lines.append(f"| {name} | {' | '.join(row)} |")
    causes = [", ".join(f"{k} {n}" for k, n in s["false_causes"].items()) or "-" for s in scores]
    lines.append(f"| causes of the false ones | {' | '.join(causes)} |")
    lines += [
        "",
        "| training | half | expected | right first | found first | val accuracy (median) |",
        "|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(r["kind"] for r in results):
        own = [r for r in results if r["kind"] == kind]
        first = Counter((_problems(r) or ["-"])[0] for r in own)
        causes = own[0]["causes"]
        right = sum(_right(r, _problems(r)[:1]) if causes else not _problems(r) for r in own)
        found = ", ".join(f"{rule} {count}" for rule, count in first.most_common())
        expected = " or ".join(causes) or "nothing"
        seen = [r["val_accuracy"] for r in own if r["val_accuracy"] is not None]
        val = f"{median(seen):.0%}" if seen else "-"
        row = (kind, own[0]["half"], expected, f"{right}/{len(own)}", found, val)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _found(result: Mapping[str, Any]) -> list[str]:
    return [finding["rule"] for finding in result["found"]]


def _problems(result: Mapping[str, Any]) -> list[str]:
    return [f["rule"] for f in result["found"] if f["severity"] == "problem"]


def _right(result: Mapping[str, Any], rules: Sequence[str]) -> bool:
    return any(rule in result["causes"] for rule in rules)


def _spelled(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    interval = f"{100 * value['low']:.1f} to {100 * value['high']:.1f}"
    return f"{value['share']:.1%} ({value['count']} of {value['of']}; {interval})"

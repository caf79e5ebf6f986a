"""All rules over the signals of a run: what is wrong, the one thing to look at first, and how a
finding reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from train.doctor.effect import effect_on
from train.doctor.finding import Rule, Severity
from train.doctor.remedy import command_with
from train.doctor.rules import RULES
from train.doctor.signals import Signals
from train.record import write_json

FILE = "doctor.json"


class Diagnosis(TypedDict):
    """An entry of doctor.json."""

    rule: str
    severity: Severity
    primary: bool
    first_step: int
    evidence: str
    explanation: str
    remedy: str
    command: str | None
    effect: dict[str, Any] | None  # of the command, where it was tried, see `effect`


def diagnose(
    signals: Signals, rules: Sequence[Rule] = RULES, *, live: bool = False
) -> list[Diagnosis]:
    """What `rules` find, problems before notes and in the rules' order, which is that of causes
    before consequences; the first problem is the primary one.

    live: only the rules that judge a run which goes on.
    """
    found = []
    for rule in rules if signals.start else ():
        if live and rule.when != "live":
            continue
        finding = rule.check(signals)
        if finding is not None:
            command = command_with(signals.start.get("config"), finding.changes)
            found.append(
                Diagnosis(
                    rule=rule.id,
                    severity=finding.severity,
                    primary=False,
                    first_step=finding.first_step,
                    evidence=finding.evidence,
                    explanation=rule.texts["en"].brief,
                    remedy=finding.remedy,
                    command=command,
                    effect=effect_on(signals, rule.id, command),
                )
            )
    found.sort(key=lambda diagnosis: diagnosis["severity"] == "note")  # stable
    if found and found[0]["severity"] == "problem":
        found[0]["primary"] = True
    return found


def write_diagnosis(folder: Path, found: Sequence[Diagnosis]) -> None:
    """Write doctor.json. Raises DiskError."""
    write_json(folder / FILE, list(found))


def line(diagnosis: Diagnosis) -> str:
    """A finding in one line, for a run that goes on."""
    kind = "PROBLEM" if diagnosis["severity"] == "problem" else "note"
    return f"doctor: {kind} {diagnosis['rule']}: {diagnosis['evidence']}"


def told(found: Sequence[Diagnosis]) -> str:
    """All findings with what to do, for somebody who asks."""
    if not found:
        return "nothing found"
    blocks = []
    for diagnosis in found:
        rank = "primary " if diagnosis["primary"] else ""
        effect = diagnosis["effect"]
        kind = f"{rank}PROBLEM" if diagnosis["severity"] == "problem" else "note"
        lines = [
            f"{kind}: {diagnosis['rule']} (first seen at step {diagnosis['first_step']})",
            f"  evidence  {diagnosis['evidence']}",
            f"  why       {diagnosis['explanation']}",
            f"  remedy    {diagnosis['remedy']}" + ("" if effect else " (not tried on this run)"),
        ]
        if effect:
            lines.append(f"  measured  {effect['text']}")
        if diagnosis["command"]:
            lines.append(f"  command   {diagnosis['command']}")
        blocks.append("\n".join(lines))
    blocks.append("`python -m train.doctor --explain RULE` says more about a rule.")
    return "\n\n".join(blocks)

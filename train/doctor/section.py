"""The doctor's part of a page: every finding with its evidence, its remedy and its pictures."""

import json
from collections.abc import Sequence
from pathlib import Path

from train.doctor.diagnose import FILE, Diagnosis
from train.doctor.figures import FIGURES
from train.doctor.rules import RULES
from train.doctor.signals import Signals, load
from train.page import Page


def add_section(page: Page, folder: Path) -> None:
    """Add what the doctor recorded in a run's folder; nothing where it did not watch.

    Raises CheckpointError or OSError when its files are damaged.
    """
    signals, path = load(folder), folder / FILE
    if path.exists():
        add_findings(page, signals, json.loads(path.read_bytes()))
    elif "failed" in signals.others:
        add_findings(page, signals, [])


def add_findings(page: Page, signals: Signals, found: Sequence[Diagnosis]) -> None:
    """Add the findings over `signals`, each picture once."""
    page.section("Doctor")
    if "failed" in signals.others:
        reason = signals.others["failed"]["message"]
        page.note("warn", f"The doctor failed to run: {reason}. The training was not affected.")
    elif all(diagnosis["severity"] == "note" for diagnosis in found):
        page.note("good", f"None of {len(RULES)} rules found a problem.")
    rules = {rule.id: rule for rule in RULES}
    shown: set[str] = set()
    for diagnosis in found:
        rule = rules[diagnosis["rule"]]
        problem = diagnosis["severity"] == "problem"
        effect = diagnosis["effect"]
        title = rule.texts["en"].title
        rank = (
            "Primary problem: " if diagnosis["primary"] else "Also seen: " if problem else "Note: "
        )
        page.note("bad" if problem else "info", f"{rank}{title}: {diagnosis['evidence']}.")
        page.text(
            f"{diagnosis['explanation']} First seen at step {diagnosis['first_step']:,};"
            f" `python -m train.doctor --explain {rule.id}` says more.",
            f"What to do{'' if effect else ' (not tried on this run)'}: {diagnosis['remedy']}.",
        )
        if diagnosis["command"]:
            page.command(diagnosis["command"])
        if effect:
            page.text(f"Tried briefly beside the unchanged recipe: {effect['text']}.")
        for name in rule.figures if problem else ():
            if name not in shown:
                shown.add(name)
                draw, caption = FIGURES[name]
                picture = draw(signals)
                if picture is not None:
                    page.figure(picture, caption, f"Evidence for {title}.", plot=True)

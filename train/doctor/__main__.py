"""What is wrong with a run: `python -m train.doctor RUN_DIR`, finished or running.

With several folders, plain and residual networks among them are compared too. `--explain RULE` says
what a rule means, why it happens, how it is recognised, what helps and what does not. `--try`
measures what the primary finding's remedy brings, `--fix` starts the run again with it.
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from train.arguments import flowing
from train.command import run_command
from train.config import from_dict
from train.doctor.diagnose import Diagnosis, diagnose, told, write_diagnosis
from train.doctor.finding import Rule
from train.doctor.request import compare_depth, try_one_batch, try_range
from train.doctor.rules import RULES
from train.doctor.section import add_findings
from train.doctor.signals import FILE, Signals, load
from train.doctor.trial import SEEDS, start_again, try_remedy
from train.errors import FOREIGN, CheckpointError, UsageError
from train.inputs import load_inputs
from train.page import Page
from train.run_report import rewrite_report
from train.validation import validation_square

HEADINGS = {
    "en": ("What it is", "Why it happens", "How it is recognised", "What helps", "What does not"),
    "id": (
        "Apa itu",
        "Mengapa terjadi",
        "Cara mengenalinya",
        "Yang menolong",
        "Yang tidak menolong",
    ),
}
SOURCES = {"en": "Sources", "id": "Sumber"}


@flowing
@dataclass(frozen=True)
class Options:
    """What to judge or to explain."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN_DIR")] = ()
    """Folders of runs."""
    explain: str | None = None
    """Explain this rule, or all of them."""
    language: Literal["en", "id"] = "en"
    """English or Indonesian, for --explain."""
    html: Path | None = None
    """Write a page with the findings and their pictures."""
    one_batch: bool = False
    """Train a fresh network of the run on 16 of its images first: can it learn them by heart?"""
    range_test: bool = False
    """Look for the learning rate that the run's network takes first: is the run's far below it?"""
    try_: Annotated[bool, tyro.conf.arg(name="try")] = False
    """Train briefly with the primary finding's remedy and without it; print the effect and add it
    to doctor.json and the report."""
    seeds: int = SEEDS
    """Pairs of trainings for --try."""
    epochs: int | None = None
    """Epochs of each training for --try (default: until the finding was seen, 200 steps at
    least)."""
    fix: bool = False
    """Start the run again with the primary finding's remedy, in a new folder beside the old one;
    with --try only where the remedy helps."""
    debug: bool = False
    """Show a traceback with errors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Judge or explain as the flags say; returns the exit code."""
    options = tyro.cli(Options, prog="python -m train.doctor", description=__doc__, args=argv)
    codes: list[int] = []  # of the run that --fix starts
    return run_command(lambda: codes.append(answer(options)), debug=options.debug) or codes[0]


def answer(options: Options) -> int:
    """Explain or judge; returns the exit code. Raises LapisError."""
    if options.explain is not None:
        print(explain(options.explain, options.language))
        return 0
    if options.runs:
        return judge(options)
    raise UsageError("name a run folder, or a rule with --explain")


def judge(options: Options) -> int:
    """Print what all rules find in each run, write its doctor.json, and try or start the remedy;
    returns the exit code.

    Raises UsageError for a folder without signals.
    """
    treats = options.try_ or options.fix
    if treats and len(options.runs) > 1:
        raise UsageError("--try and --fix treat one run: name one folder")
    runs = {folder: _signals(folder) for folder in options.runs}
    if len(runs) > 1:
        compare_depth(runs)
    page = Page("What the doctor found", ", ".join(folder.resolve().name for folder in runs))
    for folder, signals in runs.items():
        if options.one_batch:
            try_one_batch(signals)
        if options.range_test:
            try_range(signals)
        found = diagnosed(folder, signals)
        print(f"{folder}: {signals.steps:,} steps, {len(signals.probes)} probes\n{told(found)}\n")
        write_diagnosis(folder, found)
        if len(runs) > 1:
            page.section(folder.resolve().name)
        add_findings(page, signals, found)
    if options.html is not None:
        page.write(options.html)
        print(f"page: {options.html}")
    return treat(options, folder, signals, found) if treats else 0


def diagnosed(folder: Path, signals: Signals) -> list[Diagnosis]:
    """What all rules find in the signals of a run folder. Raises CheckpointError for signals that
    lack what a rule reads."""
    try:
        return diagnose(signals)
    except FOREIGN as error:
        raise CheckpointError(
            f"{folder / FILE} does not hold what the rules read ({error!r}): it is damaged, or was "
            "written by another version"
        ) from error


def treat(options: Options, folder: Path, signals: Signals, found: Sequence[Diagnosis]) -> int:
    """Try the remedy, start it, or start it if it helped; returns the exit code."""
    if options.try_:
        effect = try_remedy(folder, signals, found, seeds=options.seeds, epochs=options.epochs)
        print(effect.told())
        found = diagnosed(folder, signals)  # with the effect
        write_diagnosis(folder, found)
        config = from_dict(signals.start["config"], folder / FILE)
        rewrite_report(folder, partial(validation_square, load_inputs(config), config.data))
        if options.fix and not effect.helps:
            print("not started again: the remedy was not seen to help")
            return 0
    return start_again(folder, found) if options.fix else 0


def explain(rule_id: str, language: str) -> str:
    """A rule's explanation as text. Raises UsageError for a rule that does not exist."""
    rules = {rule.id: rule for rule in RULES}
    if rule_id == "all":
        return "\n\n\n".join(_explained(rule, language) for rule in RULES)
    if rule_id not in rules:
        raise UsageError(f"--explain {rule_id}: choose one of {', '.join(rules)}, or all")
    return _explained(rules[rule_id], language)


def _explained(rule: Rule, language: str) -> str:
    text = rule.texts[language]
    bodies = (text.what, text.why, text.recognised, text.helps, text.helps_not)
    wrapped = partial(textwrap.wrap, width=90, break_on_hyphens=False)  # flags stay whole
    lines = [f"{text.title} ({rule.id})", "", *wrapped(text.brief)]
    for heading, body in zip(HEADINGS[language], bodies, strict=True):
        lines += ["", heading, *(f"  {row}" for row in wrapped(body))]
    return "\n".join([*lines, "", SOURCES[language], *(f"  {source}" for source in rule.sources)])


def _signals(folder: Path) -> Signals:
    signals = load(folder)
    if not signals.start:
        raise UsageError(f"{folder} holds no {FILE}: name a run folder that the doctor watched")
    return signals


if __name__ == "__main__":
    sys.exit(main())

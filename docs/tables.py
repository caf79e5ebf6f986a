"""Writes the generated tables of these pages: `python -m docs.tables`.

Between `<!-- NAME: .. -->` and `<!-- end -->` stands what a command has measured or the code says.
`--bench DIR` first takes over what `python -m train.doctor.bench --out DIR` has measured, into
docs/doctor.json.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.doctor.rules import RULES
from train.files import write_atomically
from train.metrics import wilson
from train.record import read_json

DOCS = Path(__file__).resolve().parent
SCORES = {
    "detected": "faults detected (a PROBLEM in a training with a fault)",
    "first": "right cause first",
    "among": "right cause among the first three findings",
    "false": "false PROBLEM in a sound training",
}
HALVES = ("scoring", "fixing")
WHEN = {"live": "while it trains", "after": "at the end", "request": "on request"}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs.tables", description=__doc__)
    parser.add_argument("--bench", type=Path, metavar="DIR", help="results of train.doctor.bench")
    options = parser.parse_args(argv)
    if options.bench is not None:
        recorded = record(read_json(options.bench / "bench.json"))
        (DOCS / "doctor.json").write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    for page, text in pages().items():
        write_atomically(page, text.encode())
    return 0


def pages() -> dict[Path, str]:
    """Every page with generated tables, and what it should hold."""
    bench = json.loads((DOCS / "doctor.json").read_text(encoding="utf-8"))
    counts = json.loads((DOCS.parent / "profiling/results/counts.json").read_text(encoding="utf-8"))
    tables = {
        "doctor.md": {"scores": scores(bench), "rules": rules(bench.get("rules", {}))},
        "kernels.md": {"plans": plans(counts["plans"])},
    }
    return {DOCS / name: filled(DOCS / name, own) for name, own in tables.items()}


def filled(page: Path, tables: Mapping[str, str]) -> str:
    """The text of `page` with its tables written anew. Raises ValueError for one without place."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"{page} has no place for the table {name}")
        text = place.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", text)
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def scores(bench: Mapping[str, Any]) -> str:
    """The benchmark's shares with Wilson's 95 % intervals."""
    rows = [[name, *(_share(*bench[half][key]) for half in HALVES)] for key, name in SCORES.items()]
    return table(["", *(f"{half} half" for half in HALVES)], rows)


def _share(count: int, of: int) -> str:
    low, high = wilson(count, of)
    return f"{100 * count / of:.1f} %, {count} of {of} ({100 * low:.1f} to {100 * high:.1f})"


def rules(rates: Mapping[str, Mapping[str, Any]]) -> str:
    """Every rule: what it sees, where it draws the line, what helps, and, where the benchmark was
    recorded by rule, how often it was named first of the trainings whose cause it is."""
    head = ["rule", "what it sees", "how it is recognised", "what helps", "judged"]
    rows = []
    for rule in RULES:
        text = rule.texts["en"]
        row = [f"`{rule.id}`", text.brief, text.recognised, text.helps, WHEN[rule.when]]
        if rates:
            one = rates.get(rule.id)
            row.append("-" if one is None else f"{one['first'][0]} of {one['first'][1]}")
        rows.append([cell.replace("|", r"\|") for cell in row])
    return table([*head, "right cause first"] if rates else head, rows)


def record(bench: Mapping[str, Any]) -> dict[str, Any]:
    """What docs/doctor.json holds of a bench.json: counts of both halves, and by rule, of the
    trainings whose fault it names right, those whose first PROBLEM names a right cause."""
    recorded: dict[str, Any] = {
        "command": "OMP_NUM_THREADS=1 python -m train.doctor.bench --out DIR"
    }
    for half in HALVES:
        shares = bench["scores"][half]
        recorded[half] = {key: [shares[key]["count"], shares[key]["of"]] for key in SCORES}
    recorded["rules"] = {}
    for rule in RULES:
        own = [one for one in bench["trainings"] if rule.id in one["causes"]]
        first = [_first(one) in one["causes"] for one in own]
        if own:
            recorded["rules"][rule.id] = {"first": [sum(first), len(own)]}
    return recorded


def _first(training: Mapping[str, Any]) -> str | None:
    """The rule of the first PROBLEM."""
    problems = (one["rule"] for one in training["found"] if one["severity"] == "problem")
    return next(problems, None)


def plans(counted: Mapping[str, Mapping[str, int]]) -> str:
    """Launches and bytes of the trunk's plans."""
    head = ["network, plan", "launches of ours", "MB through them", "MB kept for the backward"]
    rows = []
    for name, one in counted.items():
        moved, kept = one["bytes_per_image"] / 1e6, one["kept_bytes_per_image"] / 1e6
        rows.append([name, str(one["launches"]), f"{moved:.1f}", f"{kept:.1f}"])
    return table(head, rows)


if __name__ == "__main__":
    raise SystemExit(main())

"""The report of a study: `report.html`, `report.md`, `results.csv` and `statistics.json`.

Each number of the report stands in one of the two tables or in a file of a run's folder; the words
are in `train.study.texts`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.document import Document
from train.files import unwritable, write_atomically
from train.metrics import Z
from train.page import NoteKind, percent
from train.record import write_json
from train.study.findings import Findings
from train.study.models import write_classes, write_pictures, write_stages
from train.study.plots import plot_cost
from train.study.results import COSTS, OUTCOMES, results_csv
from train.study.wording import REASONS, Wording, label, p_value, points

# the results of the course report; shares are 0..1
PUBLISHED = {
    "plain34": {
        "best_val_accuracy": 0.271,
        "final_val_accuracy": 0.247,
        "final_train_accuracy": 0.227,
        "final_val_loss": 1.573,
        "final_train_loss": 1.591,
    },
    "resnet34": {
        "best_val_accuracy": 0.447,
        "final_val_accuracy": 0.300,
        "final_train_accuracy": 0.344,
        "final_val_loss": 1.516,
        "final_train_loss": 1.538,
    },
}
NOTES: dict[str, NoteKind] = {
    "better": "good",
    "worse": "bad",
    "ahead": "warn",
    "behind": "warn",
    "none": "info",
    "unknown": "info",
}


def write_study(
    out: Path,
    *,
    models: Sequence[str],
    runs: Mapping[str, Path],
    settings: Mapping[str, Any],
    language: str,
    command: str,
) -> None:
    """Read the runs ({name: folder}) of `models` and write the report into `out`.

    settings: what study.json holds. Raises DiskError, and CheckpointError for damaged files.
    """
    found, words = Findings.read(out, models, runs, settings), Wording(language)
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out / "figures", error) from error
    write_atomically(out / "results.csv", results_csv(found.runs))
    write_json(out / "statistics.json", found.as_json())
    *others, last = map(label, models)
    names = f" {words.say('and')} ".join([*filter(None, [", ".join(others)]), last])
    numbers = {"finished": len(found.finished), "total": len(found.runs)}
    subtitle = words.say("subtitle", **numbers, data=settings["data"], recipe=settings["recipe"])
    page = Document(
        out, words.say("title", models=names), subtitle, markdown="report.md", language=language
    )
    _conclusion(page, found, words)
    if found.finished:
        write_stages(page, found, words)
        _all_models(page, found, words)
        _tests(page, found, words)
        _trade_off(page, found, words)
        _published(page, found, words)
        _worth(page, found, words)
        write_classes(page, found, words)
        write_pictures(page, found, words)
    _files(page, found, words)
    page.section(words.say("reproduce"))
    page.command(command)
    if found.finished:
        page.facts(found.finished[0].summary["versions"])
    page.write()


def _conclusion(page: Document, found: Findings, words: Wording) -> None:
    page.section(words.say("conclusion"))
    if not found.comparisons:
        page.note("info", words.say("say_single"))
    for one in found.comparisons:
        page.note(NOTES[one["verdict"]], words.finding(one))
    for model, values in found.statistics.items():
        chance = found.chance(model)
        if chance is not None:
            accuracy = values["best_val_accuracy"].value
            shares = {"accuracy": percent(accuracy), "chance": percent(chance)}
            page.text(words.say("say_chance", model=label(model), **shares))
    if found.reasons:
        shown = [name for name in REASONS if (found.reasons[name] or {}).get("shown")]
        missing = [name for name in REASONS if name not in shown]
        page.text(
            words.say("say_reasons", shown=_short(words, shown), missing=_short(words, missing))
        )
    failed = len(found.runs) - len(found.finished)
    if failed:
        page.note("bad", words.say("say_failed", failed=failed, total=len(found.runs)))
    if found.leaked:
        page.note("warn", words.say("leak", share=percent(found.leaked), kind=found.split_kind))


def _short(words: Wording, reasons: Sequence[str]) -> str:
    names = [words.say(f"short_{name}") for name in reasons]
    return ", ".join(names) or words.say("nothing")


def _all_models(page: Document, found: Findings, words: Wording) -> None:
    page.section(words.say("comparison"))
    rows = []
    for name in (*OUTCOMES, *COSTS):
        cells = [words.with_interval(name, one.get(name)) for one in found.statistics.values()]
        if any(cells):
            rows.append((words.say(name), *cells))
    counts = [f"{one['parameters']:,}" for one in found.statistics.values()]
    rows.insert(len(OUTCOMES), (words.say("parameters"), *counts))
    header = (words.say("metric"), *map(label, found.statistics))
    page.table(header, rows, words.say("all_caption"))


def _tests(page: Document, found: Findings, words: Wording) -> None:
    rows = []
    for one in found.comparisons:
        mean, photos = one.get("best_val_accuracy"), one.get("photos")
        if mean is None:
            continue
        tests = [
            f"{test['only_first']} : {test['only_second']}, p {p_value(test['p'])}"
            for test in (photos["mcnemar"] if photos else ())
        ]
        rows.append(
            (
                label(one["first"]),
                label(one["second"]),
                points(mean.value),
                words.point_span(mean.low, mean.high),
                p_value(one["p_holm"]),
                words.point_span(photos["low"], photos["high"]) if photos else "",
                "; ".join(tests),
                words.say(one["verdict"]),
            )
        )
    if rows:
        page.section(words.say("paired"))
        keys = ("first", "second", "difference", "t_interval", "p_holm", "photo_interval")
        header = words.say_all(*keys, "mcnemar", "verdict")
        page.table(header, rows, words.say("paired_caption"))


def _trade_off(page: Document, found: Findings, words: Wording) -> None:
    page.section(words.say("tradeoff"))
    shown = {}
    for model, values in found.statistics.items():
        accuracy, flops = values.get("best_val_accuracy"), values.get("flops")
        if accuracy is not None:
            shown[label(model)] = {
                "accuracy": accuracy.value,
                "low": accuracy.low,
                "high": accuracy.high,
                "flops": flops and flops.value / 1e9,
                "training_seconds": values["training_seconds"].value,
            }
    if shown:
        axes = {name: words.say(name) for name in ("flops", "training_seconds")}
        path = "figures/cost.png"
        plot_cost(shown, axes, found.out / path, words.say("best_val_accuracy"))
        page.figure(path, None, words.say("cost_caption"), words.say("cost_alt"))
    for one in found.comparisons:
        a, b = (found.statistics[one[side]] for side in ("first", "second"))
        mean = one.get("best_val_accuracy")
        if mean is None or "flops" not in a or "flops" not in b:
            continue
        shares = {key: b[key].value / a[key].value for key in ("flops", "training_seconds")}
        page.text(
            words.say(
                "say_cost",
                first=label(one["first"]),
                second=label(one["second"]),
                flops=f"{shares['flops']:.2f}x",
                parameters=f"{b['parameters'] / a['parameters']:.2f}x",
                seconds=f"{shares['training_seconds']:.2f}x",
                difference=points(mean.value),
                verdict=words.say(one["verdict"]),
            )
        )


def _published(page: Document, found: Findings, words: Wording) -> None:
    rows = []
    for model, numbers in PUBLISHED.items():
        for name, value in numbers.items():
            ours = found.statistics.get(model, {}).get(name)
            if ours is None:
                continue
            inside = ""
            if ours.low is not None:
                inside = words.say("yes" if ours.low <= value <= ours.high else "no")
            numbers_shown = (words.number(name, value), words.number(name, ours.value))
            cells = (*numbers_shown, words.interval(name, ours), inside)
            rows.append((label(model), words.say(name), *cells))
    if rows and found.settings["recipe"] == "report":
        page.section(words.say("published"))
        header = words.say_all("model", "metric", "published_value", "ours", "interval", "inside")
        page.table(header, rows, words.say("published_caption"))


def _worth(page: Document, found: Findings, words: Wording) -> None:
    page.section(words.say("data"))
    if found.error:
        error = 100 * found.error["error"]
        sizes = {key: found.error[key] for key in ("photos", "pictures")}
        accuracy, apart = percent(found.error["accuracy"]), Z * math.sqrt(2) * error
        page.text(words.say("worth", **sizes, accuracy=accuracy, error=error, apart=apart))
    key = "leak" if found.leaked else "no_leak"
    page.text(words.say(key, share=percent(found.leaked), kind=found.split_kind))
    page.text(words.say("split_paired"))


def _files(page: Document, found: Findings, words: Wording) -> None:
    page.section(words.say("files"))
    names = ("best_val_accuracy", "training_seconds")
    rows = []
    for run in found.runs:
        state = words.say("finished" if run.summary else "failed", reason=run.reason)
        cells = (words.number(name, run.value(name)) for name in names)
        rows.append((run.name, state, *cells, run.summary.get("device", "")))
    page.table(words.say_all("run", "state", *names, "device"), rows)
    page.text(words.say("files_text"))

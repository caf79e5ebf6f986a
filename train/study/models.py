"""The parts of a study's report that belong to one model: its stage, its classes, its pictures."""

from collections.abc import Sequence

import numpy as np

from train.document import Document
from train.metrics import Bin
from train.page import percent
from train.plots import plot_calibration, plot_confusion, plot_curves
from train.record import read_json
from train.study.findings import Findings
from train.study.modifications import MODIFICATIONS
from train.study.plots import plot_depth
from train.study.reasons import MOMENTS, block_names, by_depth, moments
from train.study.results import OUTCOMES, Run
from train.study.wording import REASONS, Wording, label, relative


def write_stages(page: Document, found: Findings, words: Wording) -> None:
    """The course report's three stages: plain networks, residual ones, modifications."""
    for model in found.by_model:
        stage = "stage3" if "+" in model else "stage1" if "plain" in model else "stage2"
        page.section(words.say(stage, model=label(model)))
        if "+" in model:
            _justification(page, words, model)
        _results(page, found, words, model)
        if found.base and model == found.base[1]:
            _improvement(page, found, words)
            _depth(page, found, words)
        if "+" in model:
            for one in found.comparisons:
                if one["second"] == model:
                    page.text(words.say("analysis", words=words.finding(one)))


def _justification(page: Document, words: Wording, model: str) -> None:
    name, *parts = model.split("+")
    for part in parts:
        texts = MODIFICATIONS.get(part.partition("=")[0].replace("-", "_"))
        if texts is None:
            page.text(words.say("no_why", part=f"`+{part}`"))
            continue
        why, what = texts[words.language]
        page.text(words.say("why", words=why), words.say("what", words=what))
    flags = [f"--{part.replace('_', '-').replace('=', ' ')}" for part in parts]
    page.text(words.say("how", flags=" ".join(["--model", name, *flags])))


def _results(page: Document, found: Findings, words: Wording, model: str) -> None:
    """The report's own table, each run beside the mean, and its figure."""
    runs, values = found.by_model[model], found.statistics[model]
    rows = []
    for name in OUTCOMES:
        mean = values.get(name)
        if mean is None:
            continue
        each = (words.number(name, run.value(name)) for run in runs)
        cells = (words.number(name, mean.value), words.interval(name, mean))
        rows.append((words.say(name), *cells, *each))
        if name == "best_val_accuracy":
            epochs = (str(run.summary["best_epoch"]) for run in runs)
            rows.append((words.say("best_epoch"), "", "", *epochs))
    rows.append((words.say("parameters"), f"{values['parameters']:,}", "", *("" for _ in runs)))
    seeds = (f"seed {run.pair.replace('-', ' ')}" for run in runs)
    header = (*words.say_all("metric", "mean", "interval"), *seeds)
    page.table(header, rows, words.say("stage_caption", runs=len(runs)))
    path = f"figures/curves-{model}.png"
    plot_curves(_mean_history(runs), found.out / path)
    alt = words.say("curves_alt", model=label(model))
    page.figure(path, None, words.say("curves", runs=len(runs)), alt)


def _mean_history(runs: Sequence[Run]) -> list[dict[str, float | None]]:
    """The mean of each value over the runs, an epoch that all of them have a row."""
    rows = []
    for records in zip(*(run.history for run in runs), strict=False):
        row: dict[str, float | None] = {"epoch": records[0]["epoch"]}
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            values = [record[key] for record in records]
            row[key] = None if None in values else float(np.mean(values))
        rows.append(row)
    return rows


def _improvement(page: Document, found: Findings, words: Wording) -> None:
    """The report's table of the two networks, with absolute and relative improvement."""
    compared = [one for one in found.comparisons if (one["first"], one["second"]) == found.base]
    if not compared:
        return
    rows = []
    for name in OUTCOMES:
        change = compared[0].get(name)
        if change is None:
            continue
        before, after = (found.statistics[model][name].value for model in found.base)
        rows.append(
            (
                words.say(name),
                words.number(name, before),
                words.number(name, after),
                words.difference(name, change.value),
                words.difference_interval(name, change),
                relative(change.value, before),
            )
        )
    before, after = (found.statistics[model]["parameters"] for model in found.base)
    counts = (f"{before:,}", f"{after:,}", f"{after - before:+,}", "")
    rows.append((words.say("parameters"), *counts, relative(after - before, before)))
    first, second = map(label, found.base)
    page.section(words.say("plain_against", first=first, second=second))
    header = (
        words.say("metric"),
        first,
        second,
        *words.say_all("absolute", "interval", "relative"),
    )
    page.table(header, rows, words.say("improvement_caption"))


def _depth(page: Document, found: Findings, words: Wording) -> None:
    """The three reasons with their figures; models of other blocks are left out of these."""
    page.section(words.say("reasons"))
    page.text(*(words.reason(found, name) for name in REASONS))
    measured = {m: runs for m, runs in found.by_model.items() if all(map(moments, runs))}
    if any(model not in measured for model in found.base):
        return
    blocks = block_names(measured[found.base[1]][0])
    shown = {m: runs for m, runs in measured.items() if block_names(runs[0]) == blocks}
    for name, quantity in (("gradients", "gradient_norm"), ("identity", "identity_distance")):
        panels = {
            words.say(moment): {
                label(model): by_depth(runs, moment, quantity) for model, runs in shown.items()
            }
            for moment in MOMENTS
        }
        path = f"figures/{name}.png"
        axis = words.say(f"{name}_axis")
        plot_depth(panels, blocks, axis, found.out / path, log=name == "gradients")
        images = shown[found.base[1]][0].measures["fixed_images"]
        page.figure(
            path, None, words.say(f"{name}_caption", images=images), words.say(f"{name}_alt")
        )


def write_classes(page: Document, found: Findings, words: Wording) -> None:
    """Scores of each class, confusion and calibration of each model."""
    for model, values in found.statistics.items():
        scores = values.get("classes")
        if scores is None:
            continue
        runs, name = len(found.by_model[model]), label(model)
        page.section(words.say("classes", model=name))
        rows = []
        for class_name, one in scores["per_class"].items():
            spread = one["intervals"]
            shares = (words.share_of_class(one[k], spread[k]) for k in ("precision", "recall"))
            others = (words.score_of_class(one[k], spread[k]) for k in ("f1", "auc"))
            rows.append((class_name, str(one["images"]), *shares, *others))
        header = (*words.say_all("class", "images", "precision", "recall"), "F1", "AUC")
        caption = words.say("class_caption", runs=runs, macro_f1=scores["macro_f1"])
        page.table(header, rows, caption)
        path = f"figures/confusion-{model}.png"
        plot_confusion(scores["confusion"], list(scores["per_class"]), found.out / path)
        caption = words.say("confusion_caption", runs=runs)
        page.figure(path, None, caption, words.say("confusion_alt", model=name))
        path = f"figures/calibration-{model}.png"
        plot_calibration([Bin(**one) for one in scores["calibration"]], found.out / path)
        caption = words.say("calibration_caption", error=percent(scores["calibration_error"]))
        page.figure(path, None, caption, words.say("calibration_alt", model=name))


def write_pictures(page: Document, found: Findings, words: Wording) -> None:
    """Mistakes and class activation maps of each model's first run."""
    for model, (run, *_) in found.by_model.items():
        listed = run.folder / "pictures.json"
        if not listed.is_file():
            continue
        page.section(words.say("pictures", model=label(model)))
        page.text(words.say("pictures_text", run=run.name))
        pictures = []
        for one in read_json(listed):
            path = (run.folder / one["picture"]).relative_to(found.out).as_posix()
            caption = words.say(f"caption_{one['kind']}", **one, sure=percent(one["probability"]))
            pictures.append((path, caption, words.say("picture_alt", label=one["label"])))
        page.gallery(pictures)

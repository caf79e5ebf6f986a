"""Runs side by side: made-up folders whose differences are known, and two that really trained."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from scipy.stats import binomtest

from tests.test_page import BROWSER, Tags, console
from train import compare
from train.comparison import findings, pairs, read_runs, recalls, settings
from train.config import DEFAULT, to_dict
from train.metrics import wilson
from train.run import main as train

PHOTOS = 120  # of as many pictures, the second half of two classes
HOSTILE = "<b>$x$"


def make_run(folder, right, *, epochs=2, finished=True, sides=None, found=(), **optim):
    """A run whose best weights know the photos where bool `right` is true."""
    folder.mkdir()
    config = to_dict(DEFAULT)
    config["optim"] |= {"epochs": epochs, **optim}
    config["run"]["out"] = str(folder)
    labels = [HOSTILE if i >= PHOTOS / 2 else "b" for i in range(PHOTOS)]
    rows = [("filename", "label", "split")]
    rows += [(f"{i}.jpg", label, "val") for i, label in enumerate(labels)]
    rows += [("t.jpg", "b", "train"), *(sides or [])]
    with open(folder / "split.csv", "w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    with open(folder / "validation.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("filename", "label", "picture", "p:b", f"p:{HOSTILE}"))
        for i, (label, known) in enumerate(zip(labels, right, strict=True)):
            first = 0.9 if (label == "b") == bool(known) else 0.1
            writer.writerow((f"{i}.jpg", label, f"d{i}", first, 1 - first))
    history = [
        {
            "epoch": epoch,
            "train_loss": 1.5,
            "train_accuracy": 0.5,
            "val_loss": 1.25,
            "val_accuracy": float(np.mean(right)),
            "images_per_second": 100.0 * epoch,
            "seconds": 2.0,
        }
        for epoch in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    (folder / "config.json").write_text(json.dumps({"command": "python", **config}))
    doctor = [{"rule": r, "severity": "problem", "primary": not n} for n, r in enumerate(found)]
    (folder / "doctor.json").write_text(json.dumps(doctor))
    if finished:
        summary = {"parameters": 1234567, "seconds": 9.0, "device": "a card", "backend": "eager"}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def three(tmp_path):
    """The second knows 30 photos more than the first and 5 less, the third has another split."""
    number = np.arange(PHOTOS)
    first = make_run(tmp_path / "a", number < 60, found=["overfit", "lr_too_high"])
    second = make_run(tmp_path / "b", (number >= 5) & (number < 90), lr=0.5)
    third = make_run(tmp_path / "c", number < 60, sides=[("u.jpg", "b", "train")], finished=False)
    return [first, second, third]


def test_photos_are_paired_where_the_splits_are_the_same(three):
    other, unpaired = pairs(read_runs(three))
    (test,) = other.photos["mcnemar"]
    assert (test["pictures"], test["only_first"], test["only_second"]) == (PHOTOS, 5, 30)
    assert other.p == pytest.approx(binomtest(5, 35).pvalue)
    assert other.photos["mean"] == pytest.approx(25 / PHOTOS)
    assert 0 < other.photos["low"] < 25 / PHOTOS < other.photos["high"]
    kind, words = other.sentence()
    assert kind == "good"
    assert words.startswith("b against a: +20.8 points of accuracy on the same photos")
    assert words.endswith("these weights of b are better on such photos.")
    (other,) = pairs(read_runs(three[1::-1]))
    assert other.sentence()[1].startswith("a against b: \u221220.8 points")
    assert "these weights of b are better" in other.sentence()[1]
    kind, words = unpaired.sentence()
    assert kind == "warn"
    assert words.startswith("c and a cannot be paired: their splits differ")
    assert f"--split {three[0] / 'split.csv'}" in words


def test_chance_is_no_difference(tmp_path):
    number = np.arange(PHOTOS)
    runs = [make_run(tmp_path / "a", number < 60), make_run(tmp_path / "b", number % 9 < 5)]
    (pair,) = pairs(read_runs(runs))
    assert pair.p > 0.05
    assert pair.sentence()[0] == "info"
    assert pair.sentence()[1].endswith("no difference is shown.")


def test_holm_counts_the_pairs(tmp_path):
    number = np.arange(PHOTOS)
    first = make_run(tmp_path / "a", number < 60)
    others = [make_run(tmp_path / name, (number >= 5) & (number < 76)) for name in "bcd"]
    raw = binomtest(5, 21).pvalue
    assert raw < 0.05 < 3 * raw
    assert [pair.p for pair in pairs(read_runs([first, *others]))] == pytest.approx([3 * raw] * 3)


@pytest.mark.parametrize(
    ("file", "reason"), [("split.csv", "b has no split.csv"), ("validation.csv", "b has no")]
)
def test_what_is_missing_is_said(file, reason, three):
    (three[1] / file).unlink()
    assert reason in pairs(read_runs(three[:2]))[0].sentence()[1]
    assert compare.main([*map(str, three), "--out", str(three[0].parent / "out")]) == 0


def test_other_photos_of_the_same_names_are_not_paired(three):
    """As those of two seeds of the synthetic dishes."""
    table = three[1] / "validation.csv"
    table.write_text(re.sub(r",d(\d+),", r",other\1,", table.read_text()))
    pair = pairs(read_runs(three[:2]))[0]
    assert "have the same names but are others" in pair.sentence()[1]
    assert pair.p is None


def test_only_what_differs_is_listed(three):
    runs = read_runs(three)
    assert settings(runs) == [("lr", [DEFAULT.optim.lr, 0.5, DEFAULT.optim.lr])]
    assert findings(runs) == [
        ("overfit", ["primary problem", "", ""]),
        ("lr_too_high", ["problem", "", ""]),
    ]
    low, high = wilson(30, 60)
    (_, first), (_, second) = recalls(runs)
    assert first[0] == "100.0\u00a0% [94,\u00a0100]"
    half = f"50.0\u00a0% [{100 * low:.0f},\u00a0{100 * high:.0f}]"
    assert second[:2] == ["0.0\u00a0% [0,\u00a06]", half]


def test_the_table_and_the_page(three, tmp_path, capsys):
    out = tmp_path / "out"
    assert compare.main([*map(str, three), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    lines = {line[:20].split("  ")[0].strip(): line for line in said.splitlines()}
    assert lines["state"].split("  ")[-1].strip() == "unfinished, 2 of 2 epochs"
    low, high = wilson(60, PHOTOS)
    assert f"50.0 % [{100 * low:.0f}, {100 * high:.0f}]" in lines["best accuracy"]
    assert lines["images/s"].split() == ["images/s"] + ["150.0"] * 3
    assert lines["seconds of training"].split()[-1] == "4.0"
    assert lines["parameters"].split() == ["parameters", "1,234,567", "1,234,567", "-"]
    assert "these weights of b are better" in said
    document = (out / "comparison.html").read_text(encoding="utf-8")
    found = Tags(document)
    assert found.open == []
    words = "".join(found.words)
    for part in ("their splits differ", "lr", "1,234,567", HOSTILE, "primary problem"):
        assert part in words, part
    assert [a["alt"] for tag, a in found.tags if tag == "img"] == [
        "Loss and accuracy of all runs by epoch."
    ]
    assert (out / "curves.png").is_file()
    if BROWSER:
        assert console(out / "comparison.html") == []


def test_runs_of_one_name_keep_apart(tmp_path):
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
    runs = [make_run(tmp_path / place / "a", np.ones(PHOTOS)) for place in ("x", "y")]
    assert [run.name for run in read_runs(runs)] == list(map(str, runs))


@pytest.mark.parametrize(
    ("names", "code", "words"),
    [
        (["a"], 2, "one run alone cannot be compared"),
        (["a", "nowhere"], 2, "nowhere is no run: it has no config.json"),
        (["a", "."], 2, "is no run"),
        (["a", "b/../a"], 2, "is given twice"),
        (["a", "damaged"], 4, "config.json is missing or damaged"),
        (["a", "foreign"], 4, "is not of this version"),
        (["a", "half"], 4, "validation.csv is damaged"),
    ],
)
def test_bad_input_ends_with_one_sentence(names, code, words, three, tmp_path, capsys):
    for name, content in (("damaged", "{"), ("foreign", '{"model": {}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    shutil.copytree(three[1], tmp_path / "half")
    (tmp_path / "half" / "validation.csv").write_text("filename,label,picture,p:b\nx,c,d,1\n")
    out = tmp_path / "out"
    assert compare.main([*(str(tmp_path / name) for name in names), "--out", str(out)]) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_runs_that_trained(tmp_path, capsys):
    """One without validation beside one with it, the first unfinished in the eyes of its folder."""
    common = ["--model", "micro_resnet", "--image-size", "32", "--limit", "50", "--threads", "1"]
    common += ["--epochs", "1", "--out"]
    runs = [tmp_path / "one", tmp_path / "two"]
    assert train([*common, str(runs[0])]) == 0
    assert train([*common, str(runs[1]), "--val-fraction", "0", "--no-doctor"]) == 0
    (runs[0] / "summary.json").unlink()
    capsys.readouterr()
    assert compare.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "unfinished, 1 of 1 epochs" in said
    assert "two and one cannot be paired: their splits differ" in said
    assert "val fraction" in said.replace("_", " ")

"""What a run's report says of its validation photos: from the best weights, with pictures, and
never at the cost of the training."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.test_page import BROWSER, Tags, console
from train import quality, run_report, validation
from train.data import open_photos
from train.errors import CheckpointError, DiskError
from train.evaluation import evaluate
from train.flags import read_config
from train.predictor import load_trained
from train.quality import surest_mistakes
from train.record import read_json, read_jsonl
from train.run import main as run
from train.run_report import write_report
from train.validation import read_validation

FLAGS = ["--model", "micro_resnet", "--image-size", "32", "--limit", "100", "--threads", "1"]
FLAGS += ["--amp", "off", "--optimizer", "sgd", "--lr", "0.1", "--no-doctor", "--ema", "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Its best epoch is not its last."""
    out = tmp_path_factory.mktemp("runs") / "one"
    for seed in range(9):
        shutil.rmtree(out, ignore_errors=True)
        assert run([*FLAGS, "--epochs", "4", "--seed", str(seed), "--out", str(out)]) == 0
        summary = read_json(out / "summary.json")
        if summary["best_epoch"] < 4 and summary["final_val_accuracy"] < 1:
            return out
    raise AssertionError("no seed has its best epoch before its last")


def report_of(folder, **changes):
    """The report of a copy of a run's folder, written anew."""
    summary = read_json(folder / "summary.json")
    state = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    arguments = {
        "config": read_json(folder / "config.json"),
        "summary": summary,
        "history": read_jsonl(folder / "metrics.jsonl"),
        "confusion": state["best"]["confusion"],
        "classes": summary["classes"],
    }
    write_report(folder, **{**arguments, **changes})
    return (folder / "report.html").read_text(encoding="utf-8")


def test_validation_is_what_the_best_weights_say_of_the_photos(finished):
    found = read_validation(finished)
    rows = list(csv.DictReader((finished / "split.csv").open()))
    assert list(found.files) == [row["filename"] for row in rows if row["split"] == "val"]
    trained = load_trained(finished, torch.device("cpu"), None)
    photos = open_photos("synthetic", seed=trained.config.run.seed)
    kept = evaluate(trained, photos.subset([photos.files.index(file) for file in found.files]))
    np.testing.assert_array_equal(kept.labels, found.labels)
    logits = np.log(found.probability) / trained.temperature
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(kept.probability, expected, atol=1e-5)
    assert found.right.mean() == read_json(finished / "summary.json")["best_val_accuracy"]


def test_the_report_holds_classes_calibration_mistakes_and_speed(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    found = Tags(page)
    words = "".join(found.words).replace("\u00a0", " ")
    for part in ("Calibration", "Worst mistakes", "expected calibration error", "images/s"):
        assert part in words, part
    checked = read_validation(finished)
    areas = [roc_auc_score(checked.labels == k, checked.probability[:, k]) for k in range(5)]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    shown = {row[0]: row[5] for row in rows if len(row) == 7}
    for name, area in zip(checked.classes, areas, strict=True):
        assert re.fullmatch(rf"{area:.3f} \[\d\.\d\d, \d\.\d\d\]", shown[name].replace("\xa0", " "))
    wrong = np.flatnonzero(~checked.right)
    worst = wrong[checked.probability[wrong].max(axis=1).argmax()]
    assert f"{checked.files[worst]}: {checked.classes[checked.labels[worst]]}, taken for" in words
    size = read_config(finished / "config.json").data.evaluated_size
    beside = [a for tag, a in found.tags if tag == "img" and a["width"] == str(2 * size)]
    assert 1 <= len(beside) <= quality.WORST
    assert {a["height"] for a in beside} == {str(size)}


def test_mistakes_come_surest_first_and_each_picture_once():
    probability = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.05, 0.95]])
    labels = np.array([1, 1, 0, 1, 1])
    assert list(surest_mistakes(probability, labels, "abcda")) == [1, 2, 3, 0]
    assert list(surest_mistakes(probability, labels, "abcbb")) == [1, 2, 0]


@pytest.mark.parametrize(
    ("name", "what", "still"),
    [
        ("plot_curves", "The curves", "Worst mistakes"),
        ("add_classes", "The classes", "Calibration"),
        ("add_calibration", "The calibration", "Worst mistakes"),
        ("fit_temperature", "The calibration", "Worst mistakes"),
        ("score", "What is known of each photo", "Classes"),
        ("load_trained", "The worst mistakes", "Calibration"),
        ("read_validation", "What is known of each photo", "Classes"),
    ],
)
def test_no_part_of_the_report_ends_a_training(
    name, what, still, finished, tmp_path, monkeypatch, capsys
):
    def broken(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(run_report, name, broken)
    out = tmp_path / "r"
    assert run([*FLAGS, "--epochs", "1", "--out", str(out)]) == 0
    assert (
        f"warning: report.html: {what.lower()} cannot be shown (no ink)" in capsys.readouterr().err
    )
    words = "".join(Tags((out / "report.html").read_text()).words)
    assert f"{what} cannot be shown: no ink." in words
    assert still in words


def test_a_full_disk_costs_validation_csv_and_not_the_training(tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise DiskError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(validation, "write_atomically", full)
    out = tmp_path / "r"
    assert run([*FLAGS, "--epochs", "1", "--out", str(out)]) == 0
    assert "validation.csv was not written" in capsys.readouterr().err
    words = "".join(Tags((out / "report.html").read_text()).words)
    assert "Confusion matrix" not in words
    assert "most often taken for" in words
    assert "Calibration" not in words


def test_validation_of_other_weights_is_not_shown(finished, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(finished, folder)
    assert "Calibration" in report_of(folder)
    lines = (folder / "validation.csv").read_text().splitlines()
    cells = lines[1].split(",")
    lines[1] = ",".join([*cells[:3], *reversed(cells[3:])])
    (folder / "validation.csv").write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match="is not of the best epoch"):
        document = report_of(folder)
    assert "Calibration" not in document
    assert "most often taken for" in document
    (folder / "validation.csv").write_text("filename,label,picture,p:a\nx,b,1,0.5\n")
    with pytest.raises(CheckpointError, match=r"validation\.csv is damaged"):
        read_validation(folder)


def test_a_run_taken_up_after_its_last_epoch_has_the_whole_report(finished, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(finished, folder)
    before = json.loads((folder / "summary.json").read_text())
    for name in ("report.html", "summary.json", "calibration.png"):
        (folder / name).unlink()
    assert run(["--resume", str(folder)]) == 0
    assert read_json(folder / "summary.json")["best_val_accuracy"] == before["best_val_accuracy"]
    assert "Worst mistakes" in (folder / "report.html").read_text()
    assert (folder / "calibration.png").exists()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_opens_it_without_a_word_and_without_a_request(finished):
    assert console(finished / "report.html") == []

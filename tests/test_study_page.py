"""The study's report on runs that were never trained: known numbers in, known words out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.test_page import BROWSER, console
from train.study.page import PUBLISHED, write_study

CLASSES = ("bakso", "rendang")
PHOTOS = 100


def fake_run(out: Path, model: str, seed: int, accuracy: float, leaked: float = 0.0) -> Path:
    """A finished run that knows the first `accuracy` of its 100 validation photos."""
    folder = out / "runs" / f"{model}-seed{seed}"
    (folder / "checkpoints").mkdir(parents=True)
    known = np.arange(PHOTOS) < round(accuracy * PHOTOS)
    labels = np.arange(PHOTOS) % 2
    named = np.where(known, labels, 1 - labels)
    rows = ["filename,label,picture,p:bakso,p:rendang"]
    for i in range(PHOTOS):
        shares = (0.8, 0.2) if named[i] == 0 else (0.2, 0.8)
        rows.append(f"{i}.jpg,{CLASSES[labels[i]]},{seed}-{i},{shares[0]},{shares[1]}")
    (folder / "validation.csv").write_text("\n".join(rows) + "\n")
    (folder / "split.csv").write_text(f"filename,label,split\n{seed}.jpg,bakso,val\n")
    history = [
        {
            "epoch": epoch,
            "train_loss": 2 - accuracy - epoch / 100,
            "train_accuracy": accuracy,
            "val_loss": 1.5,
            "val_accuracy": accuracy if epoch == 2 else accuracy - 0.1,
            "seconds": 10.0,
        }
        for epoch in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    split = {"train": 400, "validation": PHOTOS, "leaked_share": leaked, "kind": "random"}
    summary = {
        "best_val_accuracy": accuracy,
        "best_epoch": 2,
        "epochs": 3,
        "final_train_loss": history[-1]["train_loss"],
        "final_train_accuracy": accuracy,
        "final_val_loss": 1.5,
        "final_val_accuracy": accuracy - 0.1,
        "parameters": 21_113_413 if "plain" in model else 21_287_237,
        "images_per_second": 30.0,
        "split": split,
        "versions": {"torch": "2.11.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    reach = 0.5 if "plain" in model else 2.0
    blocks = [
        {"name": "layer1.0", "gradient_norm": reach, "identity_distance": 0.4 + 0.01 * seed},
        {"name": "layer4.0", "gradient_norm": 1.0, "identity_distance": None},
    ]
    depth = [{"epoch": epoch, "loss": 1.0, "blocks": blocks} for epoch in (0, 2, 3)]
    measures = {"flops": 7.3e9, "peak_memory_bytes": 2e9, "fixed_images": 32, "depth": depth}
    (folder / "measures.json").write_text(json.dumps(measures))
    return folder


def report_of(
    out: Path, accuracies: dict[str, list[float]], language: str = "en", leaked: float = 0.0
) -> tuple[str, dict]:
    """Its Markdown and statistics.json."""
    runs = {
        f"{model}-seed{seed}": fake_run(out, model, seed, accuracy, leaked)
        for model, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    }
    write_study(
        out,
        models=list(accuracies),
        runs=runs,
        settings={"data": "photos", "recipe": "report"},
        language=language,
        command="python -m train.study",
    )
    report = (out / "report.md").read_text()
    return report, json.loads((out / "statistics.json").read_text())


THREE = {
    "plain34": [0.24, 0.27, 0.26],
    "resnet34": [0.44, 0.46, 0.48],
    "resnet34+se": [0.45, 0.45, 0.48],
}


def row(report: str, *starts: str) -> list[str]:
    """The cells of the first table row whose first cells are these."""
    for line in report.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[: len(starts)] == list(starts):
            return cells
    raise AssertionError(starts)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> tuple[Path, str, dict]:
    out = tmp_path_factory.mktemp("three")
    return out, *report_of(out, THREE, leaked=0.57)


def test_what_is_shown_and_what_is_not(three):
    _, report, values = three
    first, second = values["comparisons"]
    # by hand: the differences 0.20, 0.19, 0.22; s^2 (1/3 + 100/400)
    differences = np.array([0.20, 0.19, 0.22])
    half = 4.302653 * differences.std(ddof=1) * np.sqrt(1 / 3 + 0.25)
    mean = first["best_val_accuracy"]
    assert mean["value"] == pytest.approx(differences.mean())
    assert mean["high"] - mean["value"] == pytest.approx(half, rel=1e-5)
    assert [one["verdict"] for one in (first, second)] == ["better", "none"]
    assert first["p_holm"] == pytest.approx(2 * mean["p"])
    # networks that know nested sets of photos: only the second knows 20, 19 and 22 of them
    tests = first["photos"]["mcnemar"]
    assert [(t["only_first"], t["only_second"]) for t in tests] == [(0, 20), (0, 19), (0, 22)]
    assert tests[0]["p"] == pytest.approx(2 / 2**20)
    assert "ResNet-34 is better than Plain-34: +20.3 points" in report
    assert "No difference shown between ResNet-34+se and ResNet-34: +0.0 points" in report
    shown = "bear out: gradients reach the early layers better, the training loss ends lower."
    assert f"{shown} Not shown: blocks stay near the identity." in report
    assert row(report, "best validation accuracy", "25.7\u00a0%", "46.0\u00a0%")[3:] == [
        "+20.3 points",
        f"{20.333 - 100 * half:.1f} to {20.333 + 100 * half:.1f}",
        "+79.2\u00a0%",
    ]
    for words in ("Stage 3: ResNet-34+se", "Why it was chosen. Dishes", "--model resnet34 --se"):
        assert words in report


def test_published_numbers_stand_beside_ours(three):
    _, report, values = three
    ours = values["statistics"]["plain34"]["best_val_accuracy"]
    published = PUBLISHED["plain34"]["best_val_accuracy"]
    cells = row(report, "Plain-34", "best validation accuracy")
    assert cells[2:4] == ["27.1\u00a0%", "25.7\u00a0%"]
    assert cells[5] == ("yes" if ours["low"] <= published <= ours["high"] else "no") == "yes"
    assert row(report, "ResNet-34", "final validation loss")[2] == "1.516"
    assert "57.0\u00a0% of the validation photos have a twin" in report
    assert "too high and rewards memory" in report
    # one standard error of 39.2 % (the mean) with 100 pictures
    accuracy = np.mean([value for of in THREE.values() for value in of])
    error = 100 * np.sqrt(accuracy * (1 - accuracy) / 100)
    assert f"one standard error is {error:.1f} points" in report


def test_one_run_each_claims_nothing(tmp_path):
    report, values = report_of(tmp_path, {"plain34": [0.25], "resnet34": [0.75]})
    (one,) = values["comparisons"]
    assert one["verdict"] == "ahead"
    assert one["best_val_accuracy"]["p"] is None
    assert "a single pair of runs has no interval over seeds" in report
    assert "bear out: none." in report
    # half of the photos are of one class; 75 of 100 are more than that, 25 are not
    chance = "is not shown to be better than always naming the most frequent class (50.0\u00a0%)"
    assert f"Plain-34 (25.0\u00a0%) {chance}" in report
    assert report.count("is not shown to be better") == 1


def test_in_indonesian(tmp_path):
    report, _ = report_of(tmp_path, THREE, language="id")
    for heading in (
        "Tahap 1: Analisis Performa Model Dasar, Plain-34",
        "Tahap 2: Implementasi Residual Connection, ResNet-34",
        "Tahap 3: Eksperimen Modifikasi Arsitektur, ResNet-34+se",
        "Perbandingan Semua Model",
        "Analisis Trade-off",
    ):
        assert f"## {heading}\n" in report
    for words in ("Justifikasi Pemilihan.", "Deskripsi Arsitektur.", "Implementasi:", "Analisis."):
        assert f"\n{words}" in report
    assert "ResNet-34 lebih baik dari Plain-34: +20.3 poin" in report
    assert not re.search(r"\b(the|of|shown)\b", report)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_opens_it_without_a_word(three):
    assert console(three[0] / "report.html") == []

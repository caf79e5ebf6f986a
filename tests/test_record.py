"""Run folders, JSON files that survive a crash, pictures and the run's report."""

import datetime
import json
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from PIL import Image
from sklearn.metrics import precision_score, recall_score

from train import files
from train.errors import CheckpointError, DiskError, UsageError
from train.metrics import wilson
from train.plots import plot_confusion, plot_curves
from train.record import create_run_folder, read_json, read_jsonl, write_json, write_jsonl
from train.run_report import write_report
from train.verdict import verdict

CLASSES = ["bakso", "<img src=x onerror=alert(1)>", "$rendang$"]
CONFUSION = np.array([[30, 6, 4], [5, 20, 0], [0, 15, 20]])


def make_history(epochs: int = 6, gap: float = 0.0, validation: bool = True) -> list[dict]:
    """Accuracy rises by 0.1 an epoch; validation falls behind by `gap` more each epoch."""
    rows = []
    for epoch in range(1, epochs + 1):
        accuracy = 0.2 + 0.1 * epoch
        rows.append(
            {
                "epoch": epoch,
                "train_loss": 2.0 / epoch,
                "train_accuracy": accuracy,
                "val_loss": 2.2 / epoch if validation else None,
                "val_accuracy": accuracy - gap * epoch if validation else None,
                "learning_rate": 1e-3,
                "images_per_second": 31.25,
                "seconds": 28.0,
            }
        )
    return rows


def make_summary(**changes) -> dict:
    summary = {
        "model": "resnet34",
        "backend": "eager",
        "backend_reason": "no C++ compiler",
        "device": "cpu",
        "parameters": 21287237,
        "trainable_parameters": 21287237,
        "epochs": 6,
        "best_val_accuracy": 0.7,
        "best_epoch": 6,
        "final_train_accuracy": 0.8,
        "images_per_second": 31.25,
        "seconds": 3725.0,
        "seed": 0,
        "split": {
            "kind": "grouped",
            "groups": 400,
            "train": 300,
            "validation": 100,
            "leaked_share": 0.0,
        },
        "classes": CLASSES,
        "versions": {"torch": "2.11.0"},
        "command": ["python", "-m", "train.run", "--data", "my photos"],
    }
    return summary | changes


# The run folder


def test_run_folders_are_numbered_by_day_and_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    today = datetime.date.today().isoformat()
    first = create_run_folder(None, "resnet34")
    assert first == Path(f"runs/{today}-resnet34-001")
    assert (tmp_path / first).is_dir()
    assert create_run_folder(None, "resnet34+se").name == f"{today}-resnet34+se-001"
    assert create_run_folder(None, "resnet34").name == f"{today}-resnet34-002"
    first.rmdir()  # the newest run keeps the highest number when an old one is deleted
    assert create_run_folder(None, "resnet34").name == f"{today}-resnet34-003"


def test_a_number_taken_meanwhile_is_passed_over(tmp_path, monkeypatch):
    """Another run makes its folder after this one has looked which numbers are free."""
    monkeypatch.chdir(tmp_path)
    taken = [create_run_folder(None, "m") for _ in range(2)]
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    folder = create_run_folder(None, "m")
    assert folder not in taken
    assert folder.name.endswith("-m-003")


def test_out_is_made_with_its_parents_and_may_exist_empty(tmp_path):
    out = tmp_path / "a" / "b"
    assert create_run_folder(out, "m") == out
    assert create_run_folder(out, "m") == out
    assert list(out.iterdir()) == []


def test_out_that_holds_a_run_is_refused_with_the_cure(tmp_path):
    write_json(tmp_path / "config.json", {})
    with pytest.raises(UsageError, match=r"holds a run already.*--resume") as caught:
        create_run_folder(tmp_path, "m")
    assert caught.value.exit_code == 2
    assert str(tmp_path) in str(caught.value)


def test_out_that_is_a_file_or_below_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        with pytest.raises(DiskError, match=re.escape(str(out))) as caught:
            create_run_folder(out, "m")
        assert caught.value.exit_code == 7


def test_out_on_a_disk_that_refuses(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(DiskError, match=r"No space left on device; .*--out"):
        create_run_folder(tmp_path, "m")


# JSON


def test_json_round_trip_with_what_json_has_no_word_for(tmp_path):
    path = tmp_path / "a.json"
    write_json(
        path,
        {
            "text": "Größe <&>",
            "path": Path("x") / "y",
            "nan": math.nan,
            "inf": [math.inf, (np.float32(0.5), np.int64(3), np.float64("nan"))],
            "array": np.arange(3),
            "nested": {1: None, "flag": np.bool_(True)},
        },
    )
    written = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{8}", written.pop("crc32"))
    assert written == read_json(path)
    assert written == {
        "text": "Größe <&>",
        "path": str(Path("x") / "y"),
        "nan": None,
        "inf": [None, [0.5, 3, None]],
        "array": [0, 1, 2],
        "nested": {"1": None, "flag": True},
    }


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(DiskError, match=r"cannot write .*a\.json: No space left"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_files_get_the_mode_any_new_file_gets(tmp_path):
    write_json(tmp_path / "a.json", {})
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b").stat().st_mode


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers()), max_size=4), st.data())
def test_json_lines_survive_a_tear_anywhere(tmp_path_factory, records, data):
    path = tmp_path_factory.mktemp("lines") / "m.jsonl"
    assert read_jsonl(path) == []
    write_jsonl(path, records)
    assert read_jsonl(path) == records
    content = path.read_bytes() if records else b""
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = content[: cut + 1].count(b"\n")  # all lines but the newline is a whole record too
    assert read_jsonl(path) == records[:whole]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(CheckpointError, match=r"m\.jsonl is damaged at line 2"):
        read_jsonl(path)


def test_lines_for_a_folder_that_is_gone(tmp_path):
    with pytest.raises(DiskError, match="gone"):
        write_jsonl(tmp_path / "gone" / "m.jsonl", [])


# Pictures


@pytest.mark.parametrize(
    "history",
    [make_history(), make_history(1), make_history(validation=False), []],
    ids=["usual", "one epoch", "no validation", "nothing yet"],
)
def test_curves_are_drawn_for_any_history(tmp_path, history):
    path = tmp_path / "curves.png"
    plot_curves(history, path)
    with Image.open(path) as image:
        assert image.width > 2 * image.height
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 10


def test_curves_show_their_numbers(tmp_path):
    plot_curves(make_history(gap=0.0), tmp_path / "a.png")
    plot_curves(make_history(gap=0.05), tmp_path / "b.png")
    plot_curves(make_history(gap=0.05), tmp_path / "c.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_confusion_colours_are_shares_of_the_row(tmp_path):
    path = tmp_path / "m.png"
    plot_confusion([[8, 2], [200, 800]], ["a", "b"], path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    large = {tuple(map(int, colour)) for colour in colours[counts > 5000]}
    expected = colormaps["Blues"]([0.2, 0.8], bytes=True)[:, :3]
    assert large - {(255, 255, 255)} == {tuple(map(int, colour)) for colour in expected}


def test_confusion_of_101_classes_keeps_every_cell_readable(tmp_path):
    generator = random.Random(0)
    matrix = np.diag([generator.randint(50, 200) for _ in range(101)])
    path = tmp_path / "m.png"
    plot_confusion(matrix, [f"class_{i}" for i in range(101)], path)
    with Image.open(path) as image:
        assert 101 * 20 < image.width < 4000  # at least 20 pixels a cell, three digits fit


def test_confusion_must_match_the_classes(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(2, 3\) for 2 classes"):
        plot_confusion([[1, 2, 3], [4, 5, 6]], ["a", "b"], tmp_path / "m.png")
    assert list(tmp_path.iterdir()) == []


# The report


def test_wilson_against_published_values():
    # Newcombe 1998, table I: 81/263 -> 0.2553, 0.3662; 15/148 -> 0.0624, 0.1605; 0/20 -> 0, 0.1611
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


def test_verdict_of_a_good_run():
    kind, sentence = verdict(make_summary(), make_history(), CONFUSION, CLASSES)
    assert kind == "good"
    plain = sentence.replace("\u00a0", " ")
    assert plain.startswith("Best validation accuracy 70.0 % in epoch 6 of 6 (70 of 100 photos, 95")
    assert "95 % interval 60.4 % to 78.1 %; chance 40.0 %" in plain
    assert "did not widen" in plain


def test_verdict_of_an_overfitted_run():
    kind, sentence = verdict(make_summary(), make_history(gap=0.05), CONFUSION, CLASSES)
    assert kind == "warn"
    assert "widened from 7.5 to 27.5 points, a sign of overfitting" in sentence


def test_verdict_at_chance_level():
    kind, sentence = verdict(make_summary(best_val_accuracy=0.41), [], None, ["a", "b", "c"])
    assert kind == "bad"
    assert "41 of 100 photos" in sentence
    assert "chance 33.3\u00a0%" in sentence
    assert "not clearly better than guessing" in sentence


def test_verdict_without_validation():
    summary = make_summary(best_val_accuracy=None, best_epoch=None)
    kind, sentence = verdict(summary, make_history(validation=False))
    assert kind == "info"
    assert "no validation" in sentence
    assert "80.0\u00a0%" in sentence


def test_report_holds_the_whole_run(tmp_path):
    config = {"model": {"model": "resnet34"}, "optim": {"lr": 1e-3, "classes": ("a", "b")}}
    write_report(
        tmp_path,
        config=config,
        summary=make_summary(),
        history=make_history(),
        confusion=CONFUSION,
        classes=CLASSES,
    )
    made = sorted(item.name for item in tmp_path.iterdir())
    assert made == ["confusion_matrix.png", "curves.png", "report.html"]
    document = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", " ", document).replace("\u00a0", " ")
    assert document.count("<img ") == 2
    assert "&lt;img src=x onerror=alert(1)&gt;" in document
    for part in (
        "21,287,237",
        "eager (no C++ compiler)",
        "31.2 images/s",
        "1 h 2 min",
        "python -m train.run --data &#x27;my photos&#x27;",
        "2.11.0",
        "a, b",
        "0.0 %",
    ):
        assert part in text, part
    assert "identical twin" not in text


def test_report_per_class_numbers_against_sklearn(tmp_path):
    write_report(
        tmp_path,
        config={},
        summary=make_summary(),
        history=make_history(),
        confusion=CONFUSION,
        classes=CLASSES,
    )
    true, predicted = (np.repeat(axis.ravel(), CONFUSION.ravel()) for axis in np.indices((3, 3)))
    document = (tmp_path / "report.html").read_text(encoding="utf-8").replace("\u00a0", " ")
    rows = re.findall(r"<tr>(.*?)</tr>", document)[1:4]
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row)[1:4] for row in rows]
    precision = precision_score(true, predicted, average=None)
    recall = recall_score(true, predicted, average=None)
    for index, cells in enumerate(found):
        expected = [f"{100 * precision[index]:.1f} %", f"{100 * recall[index]:.1f} %"]
        assert cells == [str(CONFUSION[index].sum()), *expected]


def test_report_without_validation_and_with_a_leak(tmp_path):
    split = {"kind": "random", "leaked_share": 0.57}
    summary = make_summary(best_val_accuracy=None, split=split)
    write_report(tmp_path, config={}, summary=summary, history=make_history(2, validation=False))
    document = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "57.0\u00a0% of the validation images have an identical twin" in document
    assert document.count("<img ") == 1

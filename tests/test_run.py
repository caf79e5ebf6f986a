"""The main job from the outside: its files, its lines, its exit codes, and an exact resume."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import MODELS, build_model
from train import checkpoint, config, flags, run
from train.config import RECIPES, DataConfig, from_dict, to_dict
from train.data import load_images, open_photos
from train.data.loader import Loader
from train.errors import CheckpointError
from train.inputs import centres, evaluated, stored_size
from train.record import read_json, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--model", "micro_resnet", "--image-size", "32", "--epochs", "2", "--threads", "2"]
FOOD5 = ROOT.parent / "shared" / "data" / "food5"


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Three classes of 14 small pictures that differ in colour; two files are copies."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, colour in enumerate([(200, 40, 40), (40, 200, 40), (40, 40, 200)]):
        folder = root / f"class{label}"
        folder.mkdir()
        for i in range(14):
            noise = rng.normal(0, 40, (40, 48, 3))
            pixels = np.clip(noise + colour, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    return root


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAPIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def main(*argv: object) -> int:
    return run.main([str(word) for word in argv])


def read(path: Path):
    return read_json(path)


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    assert main(*QUICK, "--data", photos, "--out", out, "--dropout", "0.2") == 0
    return out


def test_run_folder_is_complete(finished):
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert files == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "signals.jsonl",
        "doctor.json",
        "summary.json",
        "batch.png",
        "curves.png",
        "calibration.png",
        "confusion_matrix.png",
        "report.html",
        "validation.csv",
        "split.csv",
        "checkpoints/last.pt",
        "checkpoints/previous.pt",
        "checkpoints/best.pt",
    }


def test_summary_and_metrics(finished):
    summary = read(finished / "summary.json")
    lines = read_jsonl(finished / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2]
    assert set(lines[0]) == {
        "epoch",
        "train_loss",
        "train_accuracy",
        "skipped_steps",
        "val_loss",
        "val_accuracy",
        "learning_rate",
        "images_per_second",
        "seconds",
    }
    assert summary["best_val_accuracy"] == max(line["val_accuracy"] for line in lines)
    assert summary["final_val_loss"] == lines[-1]["val_loss"]
    assert summary["parameters"] == summary["trainable_parameters"] > 0
    assert summary["backend"] == "eager"
    assert summary["split"]["leaked_share"] == 0
    assert summary["split"]["duplicate_groups"] == 3
    assert summary["split"]["train"] + summary["split"]["validation"] == 45
    required = "model backend_reason device epochs best_epoch final_train_loss seed"
    assert not [key for key in required.split() if summary.get(key) is None]


def test_split_keeps_copies_together(finished):
    rows = list(csv.DictReader((finished / "split.csv").open()))
    sides = {row["filename"]: row["split"] for row in rows}
    for label in range(3):
        assert sides[f"class{label}/0.png"] == sides[f"class{label}/copy.png"]
    assert {row["label"] for row in rows} == {"class0", "class1", "class2"}


def test_checkpoint_opens_without_pickle_and_holds_the_weights(finished):
    best = checkpoint.load(finished / "checkpoints" / "best.pt")
    model = build_model("micro_resnet", 3)
    model.load_state_dict(best["weights"])
    assert best["classes"] == ["class0", "class1", "class2"]
    assert from_dict(best["config"]).model.dropout == 0.2


def test_validation_is_that_of_the_kept_weights(finished, photos):
    """Recomputed from best.pt alone, the validation accuracy is the one of the summary."""
    best = checkpoint.load(finished / "checkpoints" / "best.pt")
    rows = [r for r in csv.DictReader((finished / "split.csv").open()) if r["split"] == "val"]
    model = build_model("micro_resnet", 3).eval()
    model.load_state_dict(best["weights"])
    settings = from_dict(best["config"])
    pictures = open_photos(str(photos))
    images, pictures = load_images(pictures, round(settings.data.image_size * 8 / 7))
    chosen = np.array([pictures.files.index(row["filename"]) for row in rows])
    loader = Loader(
        images, pictures.labels, chosen, batch_size=7, image_size=32, dtype=torch.float32
    )
    right = sum(
        (model(batch.images).argmax(1) == batch.labels).sum().item() for batch in loader.epoch(0)
    )
    expected = read(finished / "summary.json")["best_val_accuracy"]
    assert right / len(rows) == pytest.approx(expected, abs=1.01 / len(rows))


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "extra",
    [
        ["--augment", "heavy", "--sampler", "balanced", "--cutmix", "1", "--mixup", "0.2"],
        ["--recipe", "report", "--image-size", "32"],
        ["--image-size", "80", "--start-scale", "0.5", "--val-scale", "1.2", "--flips"],
        ["--freeze-epochs", "2"],
    ],
)
def test_resume_is_exact(photos, tmp_path, monkeypatch, extra, capsys):
    flags = [*QUICK, *extra, "--epochs", "3", "--data", photos, "--dropout", "0.3"]
    assert main(*flags, "--out", tmp_path / "whole") == 0

    class StopAfterOne(run.Progress):
        def epoch_ended(self, training, record):
            super().epoch_ended(training, record)
            raise Stop

    monkeypatch.setattr(run, "Progress", StopAfterOne)
    with pytest.raises(Stop):
        main(*flags, "--out", tmp_path / "parts")
    monkeypatch.undo()
    mosaic = tmp_path / "parts" / "batch.png"
    assert mosaic.read_bytes() == (tmp_path / "whole" / "batch.png").read_bytes()
    mosaic.write_bytes(mosaic.read_bytes() + b" ")  # not made again
    assert main("--resume", tmp_path / "parts") == 0
    assert mosaic.read_bytes().endswith(b" ")
    whole, parts = (
        checkpoint.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "parts")
    )
    for key in ("weights", "model"):
        for name, value in whole[key].items():
            assert torch.equal(value, parts[key][name]), name
    timing = ("images_per_second", "seconds")
    for one, other in zip(whole["history"], parts["history"], strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {
            k: v for k, v in other.items() if k not in timing
        }


def test_resume_refuses_changed_data(finished, photos, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    state = checkpoint.load(finished / "checkpoints" / "last.pt")
    checkpoint.save(copy / "checkpoints", {**state, "data_digest": "other"}, best=False)
    assert main("--resume", copy) == 4
    assert "changed since this run began" in capsys.readouterr().err


def test_resume_takes_no_other_settings(finished, capsys):
    assert main("--resume", finished, "--lr", "0.1") == 2
    assert "leave out --lr" in capsys.readouterr().err


def test_damaged_checkpoint_falls_back_to_the_one_before(finished, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    content = (finished / "checkpoints" / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(content[: len(content) // 2])
    (folder / "previous.pt").write_bytes((finished / "checkpoints" / "previous.pt").read_bytes())
    state, path = checkpoint.load_newest(folder)
    assert path.name == "previous.pt"
    assert len(state["history"]) == 1
    (folder / "previous.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="nothing to resume from"):
        checkpoint.load_newest(folder)


def test_same_seed_same_run_and_another_seed_another(photos, tmp_path):
    weights = []
    for number, seed in enumerate([1, 1, 2]):
        out = tmp_path / str(number)
        assert main(*QUICK, "--epochs", "1", "--data", photos, "--out", out, "--seed", seed) == 0
        weights.append(checkpoint.load(out / "checkpoints" / "last.pt")["weights"]["fc.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_trains_on_everything_without_validation(photos, tmp_path):
    out = tmp_path / "all"
    assert main(*QUICK, "--data", photos, "--out", out, "--val-fraction", "0") == 0
    summary = read(out / "summary.json")
    assert summary["split"]["validation"] == 0
    assert summary["best_val_accuracy"] is summary["final_val_loss"] is None
    assert not (out / "checkpoints" / "best.pt").exists()
    assert (out / "report.html").exists()


def test_synthetic_is_the_default_source(tmp_path):
    out = tmp_path / "run"
    assert main(*QUICK, "--epochs", "1", "--limit", "50", "--out", out) == 0
    summary = read(out / "summary.json")
    assert summary["classes"] == ["bakso", "gado_gado", "nasi_goreng", "rendang", "soto_ayam"]
    assert summary["split"]["train"] == 40


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--fused", "--backend", "eager"], 2, "give one of the two"),
        (["--data", "/nowhere"], 3, "/nowhere"),
        (["--amp", "fp16", "--device", "cpu"], 2, "--amp fp16 needs a CUDA device"),
        (["--epochs", "0"], 2, "--epochs must be at least 1"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--lr", "-1"], 2, "--lr must be 0 or more"),
        (["--val-fraction", "1.5"], 2, "--val-fraction"),
        (["--clip-grad", "-1"], 2, "--clip-grad must be 0 or more"),
        (["--optimizer", "sgd", "--momentum", "0"], 2, "--no-nesterov"),
        (["--model", "micro_plain", "--zero-init-residual"], 2, "leave it out"),
        (["--model", "micro_plain", "--preact"], 2, "--preact needs residual blocks"),
        (["--threads", "0"], 2, "--threads"),
        (["--split", "stratified"], 2, "--split stratified is no file: give grouped, random"),
        (["--split", __file__], 3, "needs one column filename"),
        (["--fold", "1"], 2, "--fold and --folds need each other"),
        (["--fold", "1", "--folds", "40"], 2, "--folds 14 can"),
        (["--cutmix", "-1"], 2, "--cutmix must be 0 or more"),
        (["--start-scale", "2"], 2, "--start-scale must be above 0 and at most 1"),
        (["--val-crop", "0"], 2, "--val-crop must be above 0 and at most 1, not 0"),
        (["--val-scale", "0.1"], 2, "--val-scale times --image-size must be at least 8"),
        (["--layer-decay", "0"], 2, "--layer-decay must be above 0"),
        (["--freeze-epochs", "-1"], 2, "--freeze-epochs must be at least 0"),
        (["--init-from", "/nowhere"], 4, "/nowhere does not exist"),
    ],
)
def test_bad_flags_end_with_one_sentence(flags, code, words, photos, tmp_path, capsys):
    assert main(*QUICK, "--data", photos, "--out", tmp_path / "r", *flags) == code
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error


def test_unknown_model_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        run.parse(["--model", "resnet35"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("word", "cure"),
    [
        ("--lerning-rate", "did you mean --lr?"),
        ("--lerning_rate=1", "did you mean --lr?"),
        ("--batchsize", "did you mean --batch-size?"),
        ("--no-docter", "did you mean --no-doctor?"),
        ("--print-confg", "did you mean --print-config?"),
        ("--zzzz", "--help names all"),
        ("photos", "--help names all"),
    ],
)
def test_an_unknown_flag_is_told_with_the_nearest(word, cure, capsys):
    assert main(word, "1") == 2
    assert capsys.readouterr().err == f"error: {word} is no flag: {cure}\n"


def test_out_that_holds_a_run_is_refused(finished, photos, capsys):
    assert main(*QUICK, "--data", photos, "--out", finished) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_the_photos(photos, tmp_path, capsys):
    out = tmp_path / "nan"
    flags = ["--lr", "1e30", "--schedule", "constant", "--optimizer", "sgd", "--epochs", "3"]
    assert main(*QUICK, "--data", photos, "--out", out, "--amp", "off", *flags) == 5
    assert "not finite" in capsys.readouterr().err
    assert set(read(out / "bad_batch.json")) <= {
        row["filename"] for row in csv.DictReader((out / "split.csv").open())
    }


def test_random_split_warns_with_the_leak(photos, tmp_path, capsys):
    flags = ["--split", "random", "--val-fraction", "0.5", "--epochs", "1"]
    assert main(*QUICK, "--data", photos, "--out", tmp_path / "r", *flags) == 0
    assert "too high" in capsys.readouterr().err
    assert read(tmp_path / "r" / "summary.json")["split"]["leaked_share"] > 0


def test_another_run_has_the_very_same_split(finished, photos, tmp_path, capsys):
    """From a file, also when that is gone when the run goes on; the folder holds its own copy."""
    table = tmp_path / "theirs.csv"
    table.write_bytes((finished / "split.csv").read_bytes())
    flags = ["--split", table, "--seed", "7", "--recipe", "report", "--image-size", "48"]
    out = tmp_path / "r"
    assert main(*QUICK, "--epochs", "1", "--data", photos, "--out", out, *flags) == 0
    assert f"(given by {table})" in capsys.readouterr().out
    assert (out / "split.csv").read_bytes() == table.read_bytes()
    table.unlink()
    assert main("--resume", out) == 0


def test_no_picture_stops_a_training(photos, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise OSError("no ink")

    monkeypatch.setattr(run, "draw_batch", broken)
    out = tmp_path / "r"
    assert main(*QUICK, "--epochs", "1", "--data", photos, "--out", out) == 0
    assert "warning: batch.png was not made (no ink)" in capsys.readouterr().err
    assert not (out / "batch.png").exists()
    assert "Training batch" not in (out / "report.html").read_text()


def test_folds_and_the_sampler_from_the_command_line(photos, tmp_path, capsys):
    seen = []
    for fold in (1, 2, 3):
        flags = ["--fold", fold, "--folds", "3", "--sampler", "balanced", "--epochs", "1"]
        out = tmp_path / str(fold)
        assert main(*QUICK, "--data", photos, "--out", out, *flags) == 0
        rows = list(csv.DictReader((out / "split.csv").open()))
        seen += [row["filename"] for row in rows if row["split"] == "val"]
        said = capsys.readouterr().out
        assert f"(grouped, fold {fold} of 3)" in said
        assert "sampler: balanced, an epoch shows each class 10 times" in said
        assert "drawn with replacement from its 10 to 10 photos" in said
        report = (out / "report.html").read_text()
        assert "Training batch" in report
    assert len(seen) == len(set(seen)) == 45


def test_fused_announces_its_path_and_reason(photos, tmp_path, capsys):
    assert main(*QUICK, "--epochs", "1", "--data", photos, "--out", tmp_path / "r", "--fused") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("backend: ")]
    summary = read(tmp_path / "r" / "summary.json")
    assert lines == [f"backend: {summary['backend']} ({summary['backend_reason']})"]


def test_images_grow_in_three_parts_of_the_training():
    scaled = ["--start-scale", "0.5", "--epochs", "7"]
    parsed = run.parse([*scaled, "--image-size", "144"])
    assert config.epoch_sizes(parsed) == (72, 72, 72, 108, 108, 144, 144)
    assert config.epoch_sizes(run.parse([*scaled, "--image-size", "96"]))[::3] == (64, 80, 96)
    assert config.epoch_sizes(run.parse([*scaled, "--image-size", "48"])) == (48,) * 7
    assert run.parse(["--val-scale", "1.25", "--image-size", "128"]).data.evaluated_size == 160


def test_config_survives_json():
    for recipe in RECIPES.values():
        assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_recipe_report_is_table_1_of_the_report():
    parsed = run.parse(["--recipe", "report", "--model", "plain34"])
    optim, data = parsed.optim, parsed.data
    assert (optim.optimizer, optim.lr, optim.momentum, optim.epochs) == ("sgd", 1e-3, 0.0, 8)
    assert (optim.batch_size, optim.val_batch_size, optim.weight_decay) == (32, 64, 0.0)
    assert (optim.label_smoothing, optim.schedule, optim.ema) == (0.0, "constant", 0.0)
    assert (data.image_size, data.augment, data.mixup, data.split) == (224, "none", 0.0, "grouped")
    assert run.parse(["--recipe=report", "--lr", "0.1"]).optim.lr == 0.1


def test_help_names_every_flag_with_its_default():
    text = subprocess.run(
        [sys.executable, "-m", "train.run", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100"},
    ).stdout
    for group in config.Config.__dataclass_fields__.values():
        for field in group.default_factory.__dataclass_fields__:
            assert f"--{field.replace('_', '-')}" in text, field
    assert "--config {None}|PATH" in text
    assert "--print-config" in text
    assert set(flags.ELSEWHERE.values()) <= {word.strip(",").lstrip("-") for word in text.split()}


def printed(capsys, *argv) -> dict:
    with pytest.raises(SystemExit) as stop:
        main(*argv, "--print-config")
    assert stop.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_print_config_is_what_a_run_would_write(finished, photos, tmp_path, capsys):
    held = read(finished / "config.json")
    del held["command"]
    flags = [*QUICK, "--data", photos, "--out", finished, "--dropout", "0.2"]
    assert printed(capsys, *flags) == held
    assert printed(capsys, "--recipe", "report") == to_dict(RECIPES["report"])
    assert printed(capsys, "--resume", finished)["run"]["resume"] == str(finished)
    assert not list(tmp_path.iterdir())


def test_config_takes_over_all_settings_but_the_folder(finished, photos, tmp_path, capsys):
    file = finished / "config.json"
    own = {"out": None, "resume": None}
    held = from_dict(read(file))
    expected = replace(held, run=replace(held.run, **own))
    assert run.parse(["--config", str(file)]) == expected
    report = tmp_path / "report.json"
    report.write_text(
        json.dumps(
            printed(
                capsys,
                "--recipe",
                "report",
            )
        )
    )
    parsed = run.parse([f"--config={report}", "--lr", "find", "--no-channels-last"])
    assert parsed.run == replace(RECIPES["report"].run, channels_last=False)
    assert parsed.optim == replace(RECIPES["report"].optim, lr="find")
    out = tmp_path / "again"
    assert main("--config", file, "--out", out, "--epochs", "1") == 0
    ours = read(out / "config.json")
    assert ours.pop("command") == f"python -m train.run --config {file} --out {out} --epochs 1"
    optim = replace(held.optim, epochs=1)
    assert from_dict(ours) == replace(held, optim=optim, run=replace(held.run, out=out))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is no JSON (Expecting"),
        ("[]", "it is no mapping of model, data, optim, run"),
        ('{"optim": 3}', "it is no mapping of model, data, optim, run"),
        ('{"optimiser": {}}', "it has the unknown field optimiser"),
        ('{"optim": {"lerning_rate": 1}}', "it has the unknown field optim.lerning_rate"),
        ('{"optim": {"epochs": "ten"}}', "optim has 'epochs': 'ten'"),
        ('{"model": {"model": "resnet35"}}', "model has 'model': 'resnet35'"),
        ('{"data": {"relabel": 5}}', "data has 'relabel': 5"),
        ('{"optim": {"epochs": 0}}', "--epochs must be at least 1"),
    ],
)
def test_a_config_that_is_none_ends_with_one_sentence(content, words, tmp_path, capsys):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    assert main("--config", file) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_recipe_and_config_are_two_sets_of_defaults(finished, capsys):
    assert main("--config", finished / "config.json", "--recipe", "report") == 2
    assert "leave one out" in capsys.readouterr().err


@pytest.mark.skipif(not FOOD5.is_dir(), reason="the food5 photos are not here")
def test_food5(tmp_path):
    assert main(*QUICK, "--epochs", "1", "--data", FOOD5, "--limit", "60", "--out", tmp_path) == 0
    assert read(tmp_path / "summary.json")["split"]["leaked_share"] == 0


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_fits_every_network(recipe):
    for model in MODELS:
        assert run.parse(["--recipe", recipe, "--model", model]).model.model == model


@pytest.mark.parametrize(("size", "scale"), [(96, 4 / 3), (128, 1.0), (32, 1.0), (50, 1.1)])
@pytest.mark.parametrize("crop", [0.6, 0.875, 1.0])
@pytest.mark.parametrize("augment", ["none", "strong"])
def test_validation_sees_the_centre_of_the_stored_square(size, scale, crop, augment):
    data = DataConfig(image_size=size, val_scale=scale, val_crop=crop, augment=augment)
    store = stored_size(data)
    place = np.indices((store, store)).transpose(1, 2, 0).astype(np.uint8)
    square = np.concatenate([place, np.zeros_like(place[..., :1])], axis=2)
    centre = centres(square, data)
    assert data.evaluated_size <= len(centre) <= store
    assert len(centre) == pytest.approx(crop * store, abs=0.5)
    first, last = centre[0, 0, :2], centre[-1, -1, :2]
    assert set(first) == {(store - len(centre)) // 2}
    assert set(last - first) == {len(centre) - 1}
    assert evaluated(square, data).shape == (data.evaluated_size, data.evaluated_size, 3)
    if store == round(data.evaluated_size / crop):  # no wider for the training's sake
        assert np.array_equal(evaluated(square, data), centre)

"""A trained network in use: predict, evaluate and export from the outside, on photos made here."""

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from models import build_model
from train import checkpoint, evaluate, export, predict, run
from train.cam import activation_maps, overlay
from train.data.augment import MEAN, STD
from train.predictor import load_trained, network
from train.predictor import predict as predictions
from train.record import read_json

LABELS = ("blue", "green", "red")
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
CPU = torch.device("cpu")


def draw(path: Path, label: str, generator: np.random.Generator) -> None:
    noise = generator.normal(0, 40, (44, 52, 3))
    noise = cv2.resize(noise, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    Image.fromarray(np.clip(noise + COLOURS[label], 0, 255).astype(np.uint8)).save(path)


def draw_each(root: Path, count: int, seed: int) -> Path:
    """`count` photos of each of three colours, a folder per class."""
    generator = np.random.default_rng(seed)
    for label in COLOURS:
        (root / label).mkdir()
        for i in range(count):
            draw(root / label / f"{i}.png", label, generator)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return draw_each(tmp_path_factory.mktemp("photos"), 12, seed=0)


@pytest.fixture(scope="module")
def fresh_photos(tmp_path_factory) -> Path:
    """Some that nobody trains on."""
    return draw_each(tmp_path_factory.mktemp("fresh"), 4, seed=99)


@pytest.fixture(scope="module")
def trained_run(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAPIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        words = ["--model", "micro_resnet", "--image-size", "32", "--epochs", "6", "--ema", "0"]
        words += ["--val-scale", "1", "--no-flips", "--optimizer", "sgd", "--lr", "0.03"]
        words += ["--batch-size", "8", "--data", str(photos), "--out", str(out), "--amp", "off"]
        assert run.main(words) == 0
    return out


def from_scratch(trained_run: Path, photo: Path) -> np.ndarray:
    """The probabilities, by torch and Pillow alone."""
    state = checkpoint.load(trained_run / "checkpoints" / "best.pt")
    model = build_model("micro_resnet", 3).eval()
    model.load_state_dict(state["weights"])
    image = Image.open(photo).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    stored = image.resize((37, 37), Image.Resampling.BICUBIC, box=box)  # 32 * 8 / 7
    pixels = np.asarray(stored)[2:34, 2:34]  # 32 / 37 is the 7 / 8 of --val-crop
    values = (torch.from_numpy(pixels).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.inference_mode():
        logits = model(values.permute(2, 0, 1)[None].float()).double()
    return (logits / state["temperature"]).softmax(1)[0].numpy()


def test_json_holds_what_the_network_says(trained_run, fresh_photos, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ["--checkpoint", str(trained_run), str(fresh_photos), "--amp", "off"]
    assert predict.main([*words, "--json", str(out), "--batch-size", "5"]) == 0
    found = json.loads(out.read_text())
    assert [Path(item["file"]).relative_to(fresh_photos).as_posix() for item in found] == [
        f"{label}/{i}.png" for label in LABELS for i in range(4)
    ]
    for item in found:
        values = [item["probabilities"][label] for label in LABELS]
        expected = from_scratch(trained_run, Path(item["file"]))
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
        assert item["label"] == LABELS[int(np.argmax(values))]
        assert item["probability"] == max(values)
    assert sum(Path(item["file"]).parent.name == item["label"] for item in found) >= 10
    assert "images/s" in capsys.readouterr().err


def test_every_way_to_the_weights_says_the_same(trained_run, fresh_photos, tmp_path):
    files = [trained_run, trained_run / "checkpoints", trained_run / "checkpoints" / "best.pt"]
    for kind in ("safetensors", "onnx"):
        files.append(tmp_path / f"model.{kind}")
        words = ["--checkpoint", str(trained_run), "--format", kind, "--out", str(files[-1])]
        assert export.main(words) == 0
    found = []
    for file in files:
        out = tmp_path / "out.json"
        words = ["--checkpoint", str(file), str(fresh_photos), "--amp", "off", "--json", str(out)]
        assert predict.main(words) == 0
        found.append([list(item["probabilities"].values()) for item in json.loads(out.read_text())])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-5)


def test_table_csv_and_terminal(trained_run, fresh_photos, capsys):
    photo = str(fresh_photos / "red" / "0.png")
    assert predict.main(["--checkpoint", str(trained_run), photo, "--top-k", "2"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(photo)
    assert line.count("%") == 2
    # the photo is not taken for the file to write
    assert predict.main(["--checkpoint", str(trained_run), "--csv", photo]) == 0
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert row["file"] == photo
    assert float(row["probability"]) == max(float(row[label]) for label in LABELS)
    assert Path(photo).exists()


def test_bad_files_are_listed_skipped_and_exit_3(trained_run, fresh_photos, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    shutil.copy(fresh_photos / "red" / "0.png", folder / "good.png")
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<html>")
    (folder / "notes.txt").write_text("not a photo, and not meant as one")
    words = ["--checkpoint", str(trained_run), str(folder), str(tmp_path / "missing.jpg"), "--json"]
    assert predict.main(words) == 3
    captured = capsys.readouterr()
    assert [Path(item["file"]).name for item in json.loads(captured.out)] == ["good.png"]
    for name, reason in (
        ("empty.jpg", "empty file"),
        ("page.jpg", "not an image"),
        ("missing.jpg", "no such file or folder"),
    ):
        assert f"{name}: {reason}" in captured.err
    assert "notes.txt" not in captured.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "name at least one photo"),
        (["--top-k", "0", "x.jpg"], 2, "--top-k must be at least 1"),
        (["--batch-size", "0", "x.jpg"], 2, "--batch-size must be at least 1"),
        (["--csv", "--json", "-", "x.jpg"], 2, "both to the terminal"),
    ],
)
def test_flags_that_cannot_work(trained_run, words, code, message, capsys):
    assert predict.main(["--checkpoint", str(trained_run), *words]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.onnx", "folder"])
def test_foreign_missing_and_damaged_files_exit_4(name, trained_run, tmp_path, capsys):
    path = tmp_path / name
    words = ["--checkpoint", str(path), "photo.jpg"]
    assert predict.main(words) == 4
    if name == "folder":
        path.mkdir()
    else:
        path.write_bytes((trained_run / "checkpoints" / "best.pt").read_bytes()[:2000])
    assert predict.main(words) == 4
    assert str(path) in capsys.readouterr().err


def test_flips_average_the_mirrored_photo_in(trained_run, fresh_photos):
    trained = load_trained(trained_run, CPU, None)
    square = trained.square(lambda file, _: Image.open(file), str(fresh_photos / "red" / "1.png"))
    both = trained.forward(trained.images([square, square[:, ::-1]]))
    flipped = trained.probabilities(trained.images([square]), flips=True)
    mean = (both.mean(0, keepdim=True) / trained.temperature).softmax(1)
    np.testing.assert_allclose(flipped, mean, atol=1e-6)


def test_order_does_not_depend_on_the_batch(trained_run, fresh_photos):
    trained = load_trained(trained_run, CPU, None)
    files = [str(path) for path in sorted(fresh_photos.rglob("*.png"))]

    def load(file: str, size: int) -> Image.Image:
        return Image.open(file).convert("RGB")

    one, many = (list(predictions(trained, files, load, batch_size=n)) for n in (1, 7))
    assert [p.name for p in many] == files
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.probability, b.probability, atol=1e-5)


# ---- activation maps


def test_the_mean_of_a_map_is_the_logit_without_its_bias(trained_run):
    trained = load_trained(trained_run, CPU, None)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits, maps = activation_maps(trained.model, images)
    assert maps.shape == (2, 3, 2, 2)
    torch.testing.assert_close(maps.mean((2, 3)) + trained.model.fc.bias, logits)


def test_overlay_is_bright_where_the_map_is():
    picture = np.full((40, 60, 3), 100, np.uint8)
    evidence = np.array([[0.0, 0.0], [0.0, 4.0]])
    found = overlay(picture, evidence).astype(int).sum(axis=2)
    assert found[35, 55] > found[5, 5] + 100
    assert overlay(picture, -evidence).max() <= 52  # nothing speaks for the class: dark


def test_cam_writes_a_picture_a_photo(trained_run, fresh_photos, tmp_path, capsys):
    words = ["--checkpoint", str(trained_run), str(fresh_photos), "--cam", str(tmp_path / "cam")]
    assert predict.main(words) == 0
    names = {path.name for path in (tmp_path / "cam").iterdir()}
    # three classes hold a 0.png each
    assert {"0.cam.png", "0-2.cam.png", "0-3.cam.png"} < names
    assert len(names) == 12
    assert Image.open(tmp_path / "cam" / "0.cam.png").size == (64, 32)


# ---- evaluate


def test_evaluate_counts_and_names_the_twins(
    trained_run, photos, fresh_photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "all.json"
    words = ["--checkpoint", str(trained_run), "--data", str(photos)]
    assert evaluate.main([*words, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    split = list(csv.DictReader((trained_run / "split.csv").open()))
    trained_on = sum(row["split"] == "train" for row in split)
    assert found["twins"]["images"] == trained_on
    summary = json.loads((trained_run / "summary.json").read_text())
    assert found["twins"]["accuracy_without"] == pytest.approx(summary["best_val_accuracy"])
    assert found["images"] == 36
    assert np.sum(found["confusion"]) == 36
    assert found["accuracy"] == pytest.approx(np.trace(found["confusion"]) / 36)
    assert set(found["per_class"]) == set(LABELS)
    assert found["per_class"]["red"]["images"] == 12
    assert f"{trained_on} photos (" in capsys.readouterr().out
    page = (tmp_path / "runs" / f"evaluate-{photos.name}" / "evaluation.html").read_text()
    assert "their accuracy is memory" in page

    assert evaluate.main([*words[:3], str(fresh_photos), "--json"]) == 0
    fresh = json.loads(capsys.readouterr().out)
    assert fresh["twins"]["images"] == 0
    assert fresh["twins"]["accuracy_without"] == fresh["accuracy"]


def test_evaluate_without_data_takes_the_photos_of_the_runs_validation(
    trained_run, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["--checkpoint", str(trained_run)]
    assert evaluate.main([*words, "--json", "all.json"]) == 0
    found = read_json(Path("all.json"))
    split = list(csv.DictReader((trained_run / "split.csv").open()))
    assert found["images"] == sum(row["split"] == "val" for row in split)
    assert found["twins"]["images"] == 0
    summary = read_json(trained_run / "summary.json")
    assert found["accuracy"] == pytest.approx(summary["best_val_accuracy"])
    said = capsys.readouterr().out
    assert f"{photos.name}-validation: {found['images']} photos" in said
    assert "the best epoch was chosen on these photos" in said

    assert evaluate.main(["--checkpoint", str(trained_run / "checkpoints" / "best.pt")]) == 2
    assert "give --data PATH" in capsys.readouterr().err
    changed = shutil.copytree(trained_run, tmp_path / "changed")
    table = (changed / "split.csv").read_text()
    (changed / "split.csv").write_text(table.replace("train", "val", 1))
    assert evaluate.main(["--checkpoint", str(changed)]) == 3
    assert "a photo or its side differs" in capsys.readouterr().err


def test_evaluate_finds_mirrored_twins_saved_again(trained_run, photos, tmp_path, capsys):
    split = list(csv.DictReader((trained_run / "split.csv").open()))
    files = [row for row in split if row["split"] == "train"][:9]
    for label in LABELS:
        (tmp_path / "again" / label).mkdir(parents=True)
    for row in files:
        image = Image.open(photos / row["filename"]).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image.save(tmp_path / "again" / row["label"] / f"{Path(row['filename']).stem}.jpg")
    for label in LABELS:  # a class needs photos
        draw(tmp_path / "again" / label / "x.png", label, np.random.default_rng(7))
        draw(tmp_path / "again" / label / "y.png", label, np.random.default_rng(8))
    words = ["--checkpoint", str(trained_run), "--data", str(tmp_path / "again")]
    assert evaluate.main([*words, "--json", "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["twins"]["images"] == len(files)


def test_evaluate_refuses_classes_it_does_not_know(trained_run, tmp_path, capsys):
    for label in ("red", "violet"):
        (tmp_path / label).mkdir()
        for i in range(2):
            draw(tmp_path / label / f"{i}.png", "red", np.random.default_rng(i))
    words = ["--checkpoint", str(trained_run), "--data", str(tmp_path)]
    assert evaluate.main([*words, "--out", str(tmp_path / "out")]) == 3
    assert "has the class violet, which the network does not know" in capsys.readouterr().err


# ---- export


def test_state_dict_is_torchvisions(tmp_path, trained_run):
    """A ResNet-18's export loads into torchvision's model and computes the same."""
    state = checkpoint.load(trained_run / "checkpoints" / "best.pt")
    model = build_model("resnet18", 3)
    state["weights"] = model.state_dict()
    state["config"]["model"]["model"] = "resnet18"
    checkpoint.save(tmp_path, {k: v for k, v in state.items() if k != "schema"}, best=True)
    words = ["--checkpoint", str(tmp_path), "--format", "state_dict"]
    assert export.main(words) == 0
    theirs = torchvision.models.resnet18(num_classes=3)
    theirs.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(images), model.eval()(images))


def test_program_round_trips_at_another_batch_size(trained_run, tmp_path):
    out = tmp_path / "model.pt2"
    words = ["--checkpoint", str(trained_run), "--format", "program", "--out", str(out)]
    assert export.main(words) == 0
    extra = {"classes": ""}
    program = torch.export.load(out, extra_files=extra).module()
    assert json.loads(extra["classes"]) == list(LABELS)
    source = export.load_source(trained_run)
    images = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(program(images), source.model(images))


def test_a_wrong_onnx_program_is_not_kept(trained_run, tmp_path, monkeypatch, capsys):
    def broken(model, image_size):
        model = network(source.config, 3, source.model.state_dict(), trained_run)
        model.fc.bias.data += 0.01
        return model

    source = export.load_source(trained_run)
    monkeypatch.setattr(export, "folded", broken)
    out = tmp_path / "model.onnx"
    words = ["--checkpoint", str(trained_run), "--format", "onnx", "--out", str(out)]
    assert export.main(words) == 5
    assert "nothing was written" in capsys.readouterr().err
    assert not out.exists()


def test_export_refuses_a_foreign_ending(trained_run, tmp_path, capsys):
    words = ["--checkpoint", str(trained_run), "--format", "onnx", "--out", str(tmp_path / "m.pt")]
    assert export.main(words) == 2
    assert "ends in .onnx" in capsys.readouterr().err


def test_a_run_is_used_as_it_was_validated(photos, tmp_path, monkeypatch, capsys):
    """Size, mirror images and all: predicting its validation photos gives its own accuracy."""
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    words = [
        "--model",
        "micro_resnet",
        "--image-size",
        "32",
        "--val-scale",
        "1.25",
        "--val-crop",
        "0.8",
    ]
    words += [
        "--flips",
        "--epochs",
        "3",
        "--batch-size",
        "8",
        "--data",
        str(photos),
        "--amp",
        "off",
    ]
    assert run.main([*words, "--out", str(tmp_path / "run")]) == 0
    trained = load_trained(tmp_path / "run", CPU, None)
    assert trained.image_size == 40
    with open(tmp_path / "run" / "split.csv") as file:
        shown = [row for row in csv.DictReader(file) if row["split"] == "val"]
    names = [str(photos / row["filename"]) for row in shown]
    found = list(predictions(trained, names, lambda file, _: Image.open(file).convert("RGB")))
    mirrored = list(
        predictions(trained, names, lambda file, _: Image.open(file).convert("RGB"), flips=False)
    )
    best = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.pt")
    record = best["history"][-1]
    labels = [trained.classes.index(row["label"]) for row in shown]
    chances = np.stack([one.probability for one in found])
    right = (chances.argmax(1) == labels).mean()
    assert right == pytest.approx(record["val_accuracy"])
    logits = torch.from_numpy(np.log(chances) * trained.temperature)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    assert loss == pytest.approx(record["val_loss"], rel=1e-4)
    assert not np.allclose(chances, np.stack([one.probability for one in mirrored]), atol=1e-7)

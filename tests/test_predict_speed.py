"""Prediction beside torchvision's script: the same photos and weights, every figure written."""

import numpy as np
import pytest
import torch
from PIL import Image

from profiling import predict_speed, rows
from train import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that torchvision has, trained a little at 64 px: at 32 px two ways to resize differ
    too much."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAPIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        words = ["--model", "resnet18", "--image-size", "64", "--epochs", "4", "--limit", "60"]
        words += ["--batch-size", "8", "--val-scale", "1", "--out", str(out), "--no-doctor"]
        assert run.main(words) == 0
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine photos, wide and tall."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(9):
        soft = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        size = (90, 70) if i % 2 else (70, 100)
        soft.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=95)
    return folder


COMMAND = ["--rounds", "1", "--photos", "4", "--batch-size", "3"]


def test_every_figure_is_written(trained, photos, tmp_path, capsys):
    words = ["--checkpoint", str(trained), "--data", str(photos), "--out", str(tmp_path)]
    assert predict_speed.main([*words, *COMMAND]) == 0
    found = {row["provider"]: row for row in rows.read(tmp_path / "results.csv")}
    assert set(found) == {predict_speed.OURS, predict_speed.SCRIPT, predict_speed.SCRIPT_BF16}
    for row in found.values():
        assert float(row["low"]) <= float(row["us_per_image"]) <= float(row["high"])
        assert float(row["speedup_low"]) <= float(row["speedup"]) <= float(row["speedup_high"])
        assert row["shape"] == f"4 photos of {photos.name}"
    assert float(found[predict_speed.SCRIPT]["speedup"]) == 1
    assert found[predict_speed.SCRIPT]["dtype"] == "float32"
    assert found[predict_speed.SCRIPT]["numerics"] == "probabilities apart 0.0e+00"
    text = (tmp_path / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert "resnet18, 4 photos" in text


def test_wrong_probabilities_get_no_speed_up(trained, photos, tmp_path, monkeypatch):
    right = predict_speed.predict

    def wrong(*arguments, **options):
        for one in right(*arguments, **options):
            yield one._replace(probability=np.roll(np.eye(5, dtype=np.float32)[0], 1))

    monkeypatch.setattr(predict_speed, "predict", wrong)
    words = ["--checkpoint", str(trained), "--data", str(photos), "--out", str(tmp_path)]
    assert predict_speed.main([*words, *COMMAND]) == 0
    found = {row["provider"]: row for row in rows.read(tmp_path / "results.csv")}
    assert found[predict_speed.OURS]["speedup"] == ""
    assert found[predict_speed.SCRIPT_BF16]["speedup"] != ""


def test_the_script_shows_the_network_what_ours_does(trained, photos):
    files, cpu = sorted(str(path) for path in photos.iterdir()), torch.device("cpu")
    source = predict_speed.load_source(trained)
    mine = predict_speed.ours(trained, files, 4, cpu, None)()
    theirs = predict_speed.script(source, files, 4, cpu, bf16=False)()
    assert mine.shape == theirs.shape == (9, 5)
    # photos differ by much more than two ways to resize: an exchange would show
    assert (mine - theirs).square().mean() < 0.1 * mine.var(0).mean()


@pytest.mark.parametrize(
    ("data", "code", "said"), [("none", 2, "has no photo files"), ("damaged", 3, "leave it out")]
)
def test_photos_that_cannot_be_measured(data, code, said, trained, photos, tmp_path, capsys):
    folder = tmp_path / data
    folder.mkdir()
    if data == "damaged":
        (folder / "x.jpg").write_bytes((photos / "0.jpg").read_bytes()[:300])
    words = ["--checkpoint", str(trained), "--data", str(folder), "--out", str(tmp_path / "out")]
    assert predict_speed.main(words) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--photos", "--batch-size", "--rounds"])
def test_none_of_something_is_refused(flag, photos, tmp_path, capsys):
    words = ["--checkpoint", "x", "--data", str(photos), "--out", str(tmp_path), flag, "0"]
    assert predict_speed.main(words) == 2
    assert f"{flag} must be at least 1" in capsys.readouterr().err


def test_a_network_that_torchvision_has_not_is_refused(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    words = ["--model", "micro_resnet", "--image-size", "32", "--epochs", "4", "--limit", "60"]
    assert run.main([*words, "--out", str(tmp_path / "run"), "--no-doctor"]) == 0
    words = ["--checkpoint", str(tmp_path / "run"), "--data", str(photos)]
    assert predict_speed.main([*words, "--out", str(tmp_path)]) == 2
    assert "torchvision has no micro_resnet" in capsys.readouterr().err

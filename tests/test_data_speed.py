"""The comparison of loaders: every provider feeds the same photos, and every figure is written."""

import numpy as np
import pytest
import torch
from PIL import Image

from profiling import data_speed, rows


@pytest.fixture
def folder(tmp_path):
    """A table with two classes of six photos, each plain but for some noise."""
    (tmp_path / "set" / "train" / "deep").mkdir(parents=True)
    lines = ["filename,label"]
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 9, (50, 70, 3))
        pixels = (np.array((60, 120, 200)) + noise).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / "train" / "deep" / f"{i}.jpg", quality=95)
        lines.append(f"deep/{i}.jpg,{'xy'[i % 2]}")
    (tmp_path / "set" / "train.csv").write_text("\n".join(lines))
    return tmp_path / "set"


@pytest.mark.filterwarnings("ignore:class")
def test_all_providers_feed_like_batches(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data_speed, "LENGTH", 40)
    (tmp_path / "links").mkdir()
    job = data_speed.Job(str(folder), 32, 4, tmp_path / "links")
    means = {}
    for name, provider in data_speed.PROVIDERS.items():
        batches = provider(job, True)
        images = torch.cat([next(batches) for _ in range(8)])
        batches.close()
        assert images.shape == (32, 3, 32, 32)
        assert images.dtype == torch.float32
        means[name] = images.mean((0, 2, 3))
    grey = means["ours, 0 threads"]
    # rotated corners are black in torchvision's pictures, reflections in ours
    assert all((mean - grey).abs().max() < 0.6 for mean in means.values())
    assert torch.equal(means["ours, 2 threads"], grey)


@pytest.mark.filterwarnings("ignore:class")
def test_every_figure_is_written_and_a_row_names_its_spread(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_speed, "WINDOW_S", 0.01)
    monkeypatch.setattr(data_speed, "LENGTH", 400)
    few = {name: data_speed.PROVIDERS[name] for name in (data_speed.OURS, data_speed.RIVAL)}
    monkeypatch.setattr(data_speed, "PROVIDERS", few)
    out = tmp_path / "out"
    command = ["--data", str(folder), "--out", str(out), "--rounds", "2"]
    assert data_speed.main([*command, "--image-size", "32", "--batch-size", "4"]) == 0
    found = {(row["mode"], row["provider"]): row for row in rows.read(out / "results.csv")}
    ours, rival, pillow = data_speed.OURS, data_speed.RIVAL, data_speed.PILLOW
    assert set(found) == {
        ("fill the cache", "ours"),
        ("fill the cache", pillow),
        ("first batch", ours),
        ("first batch", rival),
        ("first batch", f"{ours}, empty cache"),
        ("feed", ours),
        ("feed", rival),
    }
    feed = found["feed", ours]
    assert float(feed["low"]) <= float(feed["us_per_image"]) <= float(feed["high"])
    assert float(feed["speedup_low"]) <= float(feed["speedup"]) <= float(feed["speedup_high"])
    assert float(found["feed", rival]["speedup"]) == 1
    text = (out / "summary.md").read_text()
    assert "set: 12 photos, 32 px, batches of 4" in text
    assert f"| {rival} |" in text
    assert text in capsys.readouterr().out + "\n"


def test_drawings_have_no_files_to_compare(tmp_path, capsys):
    assert data_speed.main(["--data", "synthetic", "--out", str(tmp_path)]) == 2
    assert "has no photo files" in capsys.readouterr().err

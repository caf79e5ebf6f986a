"""Labels that look wrong: exchanged ones are found, junk is, and a copy never votes for itself."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from train.data import Photos, open_photos, suspects
from train.data.check import as_json, main, suspects_csv
from train.data.dishes import DISHES
from train.data.examine import examine
from train.data.findings import findings
from train.data.suspects import FOLDS, find_suspects, out_of_fold, score, strangeness
from train.data.synthetic import draw

PER_DISH = 60
FOOD5 = Path(__file__).resolve().parents[2] / "shared" / "data" / "food5"


def photos_of(pictures: list[Image.Image], labels: np.ndarray, classes: tuple[str, ...]) -> Photos:
    files = tuple(f"{i}.png" for i in range(len(pictures)))
    shown = dict(zip(files, pictures, strict=True))
    return Photos(
        name="made up",
        classes=classes,
        files=files,
        labels=labels,
        digests=files,
        excluded=(),
        load=lambda file, shorter: shown[file],
    )


@pytest.fixture(scope="module")
def dishes() -> Photos:
    """Three hundred drawings under their true labels."""
    names = sorted(DISHES)
    pictures = [
        Image.fromarray(draw(0, dish, i)).resize((128, 128))
        for dish in names
        for i in range(PER_DISH)
    ]
    return photos_of(pictures, np.repeat(np.arange(5), PER_DISH), tuple(names))


def suspects_of(photos: Photos):
    everything = np.arange(len(photos))
    return find_suspects(photos, everything, everything, progress=False)


def test_exchanged_labels_are_found_and_true_ones_left_alone(dishes):
    """5 % exchanged: on 1 to 3 as seed recall was 12, 10 and 12 of 15, precision 52 %; of 300 true
    labels 12 were listed."""
    rng = np.random.default_rng(1)
    wrong = rng.choice(len(dishes), 15, replace=False)
    labels = dishes.labels.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, 5, 15)) % 5
    found = suspects_of(replace(dishes, labels=labels))
    hits = [suspect for suspect in found if suspect.photo in wrong]
    assert len(hits) >= 10
    assert len(hits) >= 0.4 * len(found)
    assert sum(suspect.photo in wrong for suspect in found[:10]) >= 6
    right = [dishes.classes[dishes.labels[s.photo]] == s.suggested for s in hits]
    assert np.mean(right) > 0.7
    assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)
    assert len(suspects_of(dishes)) <= 0.06 * len(dishes)


def test_junk_is_found_and_nothing_is_suggested_for_it(dishes):
    text = Image.new("RGB", (200, 260), "white")
    for line in range(20):
        ImageDraw.Draw(text).text((5, 5 + 12 * line), "DAFTAR MENU SOTO AYAM 15.000", fill="black")
    logo = Image.new("RGB", (200, 200), (40, 130, 220))
    ImageDraw.Draw(logo).ellipse((40, 40, 160, 160), fill=(250, 250, 90))
    junk = [text, logo, Image.new("RGB", (150, 150), "white")]
    pictures = [dishes.load(file, None) for file in dishes.files] + junk
    labels = np.concatenate([dishes.labels, [0, 1, 2]])
    found = suspects_of(photos_of(pictures, labels, dishes.classes))
    suggested = {s.photo - len(dishes): s.suggested for s in found if s.photo >= len(dishes)}
    assert suggested == {0: "", 1: "", 2: ""}
    assert all(suspect.photo >= len(dishes) for suspect in found[:3])


def test_a_sample_is_never_judged_by_its_own_group():
    """Labels by chance, every sample three times: who has seen the others knows the answer."""
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(60, 40)), 3, axis=0)
    labels = np.repeat(rng.integers(0, 3, 60), 3)
    groups = np.repeat(rng.permutation(60), 3)
    apart = out_of_fold(features, labels, groups, progress=False)
    together = out_of_fold(features, labels, np.arange(180), progress=False)
    assert np.allclose(apart.sum(1), 1)
    assert (together.argmax(1) == labels).mean() > 0.9
    assert (apart.argmax(1) == labels).mean() < 0.55


def test_a_picture_under_two_labels_is_one_group_and_judged_under_both(folder, monkeypatch):
    (folder / "green" / "twin.png").write_bytes((folder / "red" / "twin.png").read_bytes())
    groups = []

    def watched(features, labels, given, *, progress):
        groups.extend(zip(given.tolist(), labels.tolist(), strict=True))
        return out_of_fold(features, labels, given, progress=progress)

    monkeypatch.setattr(suspects, "out_of_fold", watched)
    examined = examine(open_photos(str(folder)), labels=True, progress=False)
    twin = examined.photos.files.index("green/twin.png")
    assert len(groups) == 30 + 30 + 2  # the two files in red are one picture
    assert sorted(label for group, label in groups if group == examined.pictures[twin]) == [0, 1]
    listed = {examined.photos.files[s.photo] for s in examined.suspects}
    assert "red/twin.png" in listed
    assert "green/twin.png" not in listed


def test_the_score_is_the_formula():
    chances = np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9], [0.2, 0.8], [0.4, 0.6]])
    labels = np.array([0, 0, 0, 1, 1])
    # usual chances: class 0 (0.9 + 0.5 + 0.1) / 3 = 0.5, class 1 (0.8 + 0.6) / 2 = 0.7
    scores, fits = score(chances, labels, np.array([0.0, -3.0, 0.0, 2.0, 0.0]))
    expected = [0, 0, 1 - 0.1 / 0.5, 1 - np.exp(-1), 1 - 0.6 / 0.7]
    assert np.allclose(scores, expected)
    assert fits.tolist() == [0, 0, 1, 1, 1]


def test_strangeness_is_the_distance_to_the_tenth_neighbour():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 5))
    features[7] += 9
    distances = np.sqrt(((features[:, None] - features) ** 2).sum(2))
    far = np.log(np.sort(distances, axis=1)[:, 10] + 1e-6)
    low, middle, high = np.quantile(far, (0.25, 0.5, 0.75))
    assert np.allclose(strangeness(features), (far - middle) / (high - low))
    assert strangeness(features).argmax() == 7
    assert np.isfinite(strangeness(np.zeros((3, 5)))).all()


def speckled(seed: int, colour: tuple[int, int, int]) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 40, (70, 80, 3))
    return Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Two classes by colour; in "red" stands a green photo with a copy, its name awkward."""
    for k, (label, colour) in enumerate({"red": (190, 50, 50), "green": (50, 170, 60)}.items()):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(30):
            speckled(100 * k + i, colour).save(tmp_path / "data" / label / f"{i:02}.png")
    for name in (' it, "really".png', "twin.png"):
        speckled(999, (50, 170, 60)).save(tmp_path / "data" / "red" / name)
    return tmp_path / "data"


def test_the_command_names_them_in_every_report(folder, tmp_path, capsys):
    assert main([str(folder), "--labels", "--out", str(tmp_path / "out")]) == 0
    text, progress = capsys.readouterr()
    wrong = ['red/ it, "really".png', "red/twin.png"]
    assert "warning  labels that look wrong" in text
    assert "train with --relabel" in text
    assert "describing" in progress
    listed = json.loads((tmp_path / "out" / "check.json").read_text())["suspect_labels"]
    assert [item["file"] for item in listed[:2]] == wrong
    assert all(set(item) == {"file", "label", "suggested", "score"} for item in listed)
    assert {(item["label"], item["suggested"]) for item in listed[:2]} == {("red", "green")}
    assert 0.8 <= listed[0]["score"] == listed[1]["score"] <= 1
    rows = list(csv.reader(io.StringIO((tmp_path / "out" / "suspects.csv").read_text())))
    assert rows[0] == ["filename", "label"]
    assert rows[1:3] == [[file, "green"] for file in wrong]
    assert len(rows) == 1 + len(listed)
    page = (tmp_path / "out" / "check.html").read_text()
    assert "Labels that look wrong" in page
    assert "red/ it, &quot;really&quot;.png, red/twin.png" in page


def test_a_reviewed_list_is_never_written_over(folder, tmp_path, capsys):
    flags = [str(folder), "--labels", "--out", str(tmp_path / "out")]
    assert main(flags) == main(flags) == 0
    assert "is kept" not in capsys.readouterr().out
    reviewed = tmp_path / "out" / "suspects.csv"
    reviewed.write_text("filename,label\nred/twin.png,\n")
    assert main(flags) == 0
    assert reviewed.read_text() == "filename,label\nred/twin.png,\n"
    assert "is kept" in capsys.readouterr().out


def test_without_the_flag_nothing_is_judged(folder, tmp_path, capsys):
    examined = examine(open_photos(str(folder)), progress=False)
    assert as_json(examined)["suspect_labels"] == []
    assert suspects_csv(examined) == b"filename,label\r\n"
    assert not [f for f in findings(examined) if "look wrong" in f.what]


@pytest.mark.skipif(not FOOD5.is_dir(), reason="the photos are not here")
def test_food5():
    """Judged by eye, 11 of the first 20 pictures are no dish, or another; of the next 20, 6 to 8;
    of all 437, 29."""
    examined = examine(open_photos(str(FOOD5)), labels=True, progress=False)
    ranks = {examined.photos.files[s.photo]: s for s in examined.suspects}
    assert 30 <= len({int(examined.pictures[s.photo]) for s in examined.suspects}) <= 50
    first = list(ranks)[:20]
    # a drawing, a footballer and his copy, a poster, a drawing, satay, meatballs in a pan
    for file in (
        "0967.jpg",
        "0939.jpg",
        "0954.jpg",
        "0352.jpg",
        "0389.jpg",
        "1035.jpg",
        "0743.jpg",
    ):
        assert file in first
    assert {ranks[file].suggested for file in first[:3]} == {""}


def test_classes_of_a_few_pictures_are_not_judged(dishes):
    """Neither do they cast a vote, nor are all their photos called wrong."""
    few = [i for label in range(5) for i in range(label * PER_DISH, label * PER_DISH + FOLDS - 1)]
    assert suspects_of(dishes.subset(few)) == []
    mixed = dishes.subset([*range(2 * PER_DISH), *few[2 * (FOLDS - 1) :]])
    found = suspects_of(mixed)
    assert all(suspect.photo < 2 * PER_DISH for suspect in found)
    assert {suspect.suggested for suspect in found} <= {"", *dishes.classes[:2]}

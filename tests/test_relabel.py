"""`--relabel FILE`: a reviewed table corrects or drops photos of any source, and is remembered."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train import run
from train.config import from_dict, to_dict
from train.data import open_photos
from train.data.relabel import only_classes, relabel
from train.errors import DataError, UsageError
from train.record import read_json

LABELS = {"bakso": (200, 40, 40), "rendang": (40, 200, 40), "soto": (40, 40, 200)}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for label, colour in LABELS.items():
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(rng.normal(0, 40, (40, 48, 3)) + colour, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def table(tmp_path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "review.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def labels_of(photos) -> dict[str, str]:
    return {f: photos.classes[k] for f, k in zip(photos.files, photos.labels, strict=True)}


ROWS = "filename,label\nbakso/3.png,rendang\nsoto/0.png,\nrendang/1.png,rendang\n"


def test_rows_change_drop_or_leave_a_photo(folder, table):
    before = open_photos(str(folder))
    after, done = relabel(before, table(ROWS))
    expected = labels_of(before) | {"bakso/3.png": "rendang"}
    del expected["soto/0.png"]
    assert labels_of(after) == expected
    assert (done.changed, done.dropped) == (1, 1)
    assert [(e.file, e.bad) for e in after.excluded] == [("soto/0.png", False)]
    assert "row 3 of" in after.excluded[0].reason
    assert labels_of(before)["bakso/3.png"] == "bakso"
    digests = dict(zip(before.files, before.digests, strict=True))
    assert all(digests[f] == d for f, d in zip(after.files, after.digests, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + ROWS.replace("\n", "\r\n").encode(),
        ROWS.replace(",", ";"),
        ROWS.replace(",", "\t"),
        "\n\n Filename , LABEL \n\n" + "\n , \n".join(ROWS.replace(",", " , ").split("\n")[1:]),
        "label,note,filename\nrendang,x,bakso/3.png\n,,soto/0.png\n",
        "filename,label\n./bakso/3.png,rendang\nsoto\\0.png\n",
        ROWS + "bakso/3.png,rendang\nsoto/0.png,\n",
    ],
)
def test_tables_are_read_as_people_save_them(folder, table, text):
    after, done = relabel(open_photos(str(folder)), table(text))
    assert (done.changed, done.dropped) == (1, 1)
    assert labels_of(after)["bakso/3.png"] == "rendang"
    assert "soto/0.png" not in after.files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,label\nsoto/99.png,soto\n", "row 2 of .*'soto/99.png', which is not in data"),
        ("filename,label\n../secret.png,\n", "row 2 of .*'../secret.png', which is not in data"),
        ("filename,label\n\nsoto/1.png,sotto\n", "row 3 of .*'sotto', which is no class of data"),
        ("filename,label\n,soto\n", "row 2 of .* has no filename"),
        ("filename,label\nsoto/1.png,\nsoto/1.png,bakso\n", "row 3 of .* row 2 labels it ''"),
        ("file,label\nsoto/1.png,soto\n", "needs one column filename"),
        (b"filename,label\n\xff,soto\n", "is not UTF-8"),
    ],
)
def test_rows_that_cannot_be_followed_are_named(folder, table, text, message):
    with pytest.raises(DataError, match=message):
        relabel(open_photos(str(folder)), table(text))


def test_a_missing_table_is_a_sentence(folder, tmp_path):
    with pytest.raises(DataError, match=r"gone\.csv cannot be read"):
        relabel(open_photos(str(folder)), tmp_path / "gone.csv")


def test_every_source_takes_it(folder, table, tmp_path):
    (folder / "bakso").rename(tmp_path / "train")
    rows = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(12))
    (tmp_path / "train.csv").write_text("filename,label\n" + rows)
    after, done = relabel(open_photos(str(tmp_path)), table("filename,label\n0.png,b\n3.png,\n"))
    assert (done.changed, done.dropped, labels_of(after)["0.png"]) == (1, 1, "b")
    review = table("filename,label\nbakso/0003.png,rendang\nrendang/0100.png,\n")
    after, done = relabel(open_photos("synthetic"), review)
    assert (done.changed, done.dropped, len(after)) == (1, 1, 999)
    assert labels_of(after)["bakso/0003.png"] == "rendang"


def test_a_photo_that_was_left_out_already_may_be_dropped_not_labelled(tmp_path, table):
    rows = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(5))
    (tmp_path / "train.csv").write_text("filename,label\n" + rows + "3.png,b\n")
    (tmp_path / "train").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / "train" / f"{i}.png")
    photos = open_photos(str(tmp_path))
    after, done = relabel(photos, table("filename,label\n4.png,\n"))
    assert (done.changed, done.dropped, after.files) == (0, 0, photos.files)
    with pytest.raises(DataError, match="row 2"):
        relabel(photos, table("filename,label\n4.png,b\n"))
    after, done = relabel(photos, table("filename,label\n3.png,\n"))  # listed twice, left out once
    assert (done.dropped, after.files) == (1, photos.files[:3])


def test_only_classes_keeps_names_and_renumbers(folder):
    photos = open_photos(str(folder))
    part = only_classes(photos, ("soto", "bakso"))
    assert part.classes == ("bakso", "soto")
    assert labels_of(part) == {f: c for f, c in labels_of(photos).items() if c != "rendang"}
    assert labels_of(only_classes(photos, ())) == labels_of(photos)
    with pytest.raises(UsageError, match="tempe"):
        only_classes(photos, ("soto", "tempe"))


QUICK = ["--model", "micro_resnet", "--image-size", "32", "--epochs", "2", "--threads", "1"]


def main(*argv: object) -> int:
    return run.main([str(word) for word in argv])


def test_a_run_trains_on_the_corrected_labels_and_resumes_with_no_others(
    folder, table, tmp_path, capsys
):
    review, out = table(ROWS), tmp_path / "run"
    assert main(*QUICK, "--data", folder, "--relabel", review, "--out", out) == 0
    text = capsys.readouterr().out
    assert f"{review}: 1 labels changed, 1 photos dropped" in text
    split = (out / "split.csv").read_text().splitlines()
    assert [row.rsplit(",", 1)[0] for row in split if row.startswith("bakso/3.png")] == [
        "bakso/3.png,rendang"
    ]
    assert not [row for row in split if row.startswith("soto/0.png")]
    config = read_json(out / "config.json")
    assert config.pop("command")
    assert config["data"]["relabel"] == str(review)
    assert from_dict(config).data.relabel == review
    assert to_dict(from_dict(config)) == config
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["split"]["relabelled"], summary["split"]["dropped"]) == (1, 1)
    checkpoints = out / "checkpoints"

    def resume() -> int:
        """Of the run as it was one checkpoint ago: a finished one is not taken up."""
        (checkpoints / "previous.pt").replace(checkpoints / "last.pt")
        return main("--resume", out)

    assert resume() == 0
    table(ROWS.replace("soto/0.png,", "soto/0.png,bakso"))
    assert resume() == 4
    assert "labels" in capsys.readouterr().err


def test_a_photo_may_come_from_a_class_that_is_not_trained(folder, table, tmp_path, capsys):
    """--classes chooses after the correction; a wrong table ends in 3 before anything is made."""
    review, out = table(ROWS), tmp_path / "run"
    flags = [*QUICK[:-3], "1", *QUICK[-2:], "--data", folder, "--relabel", review, "--out", out]
    assert main(*flags, "--classes", "rendang", "soto") == 0
    split = (out / "split.csv").read_text().splitlines()[1:]
    assert len(split) == 12 + 1 + 11
    assert {row.split(",")[1] for row in split} == {"rendang", "soto"}
    table(ROWS + "soto/2.png,tempe\n")
    assert main(*flags[:-1], tmp_path / "other") == 3
    assert "row 5 of" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()

"""`python -m train.data.check`: every fault of a folder is named, with its file and its cure."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from train.data import open_photos, split_photos
from train.data.check import as_json, main
from train.data.dishes import DISHES
from train.data.duplicates import photo_groups
from train.data.examine import examine, leaked_share
from train.data.findings import findings, unusable
from train.data.synthetic import draw

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
KEYS = {
    "images",
    "classes",
    "exact_duplicate_groups",
    "near_duplicate_groups",
    "conflicting_labels",
    "unreadable",
    "suspect_labels",
}


def picture(number: int, side: int = 224) -> Image.Image:
    """A drawing like no other, for each number."""
    dish = sorted(DISHES)[number % 5]
    return Image.fromarray(draw(3, dish, number // 5)).resize((side, side))


def jpeg(image: Image.Image, quality: int = 90, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def healthy(classes: str = "ab", each: int = 12) -> dict[str, bytes]:
    return {
        f"{label}/{i:02}.jpg": jpeg(picture(each * k + i))
        for k, label in enumerate(classes)
        for i in range(each)
    }


def found(root: Path) -> dict[str, tuple[str, ...]]:
    """What each finding says, and its files."""
    return {f.what: f.files for f in findings(examine(open_photos(str(root)), progress=False))}


def run(root: Path, out: Path, capsys) -> tuple[int, str, str]:
    code = main([str(root), "--out", str(out)])
    return code, *capsys.readouterr()


def test_a_healthy_folder_has_nothing_wrong(tmp_path, capsys):
    root = write(tmp_path / "data", healthy())
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*.jpg")}
    code, text, _ = run(root, tmp_path / "out", capsys)
    assert code == 0
    assert "data: 24 photos of 2 classes (a 12, b 12)\nnothing is wrong" in text
    report = json.loads((tmp_path / "out" / "check.json").read_text())
    assert report == {
        "images": 24,
        "classes": {"a": 12, "b": 12},
        "exact_duplicate_groups": [],
        "near_duplicate_groups": [],
        "conflicting_labels": [],
        "unreadable": [],
        "suspect_labels": [],
    }
    assert "Nothing is wrong" in (tmp_path / "out" / "check.html").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["check.html", "check.json"]
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*.jpg")}


def test_identical_photos_by_file_and_by_pixels(tmp_path):
    """Also of photos so large that they are decoded at reduced scale at first."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: shown upright it is the picture of c.png
    large = jpeg(picture(30, 700))
    shown = Image.open(io.BytesIO(large))
    turned = Image.open(io.BytesIO(jpeg(picture(31))))
    root = write(
        tmp_path,
        {
            **healthy(),
            "a/copy.jpg": jpeg(picture(0)),
            "a/comment.jpg": jpeg(picture(0), comment=b"the same pixels"),
            "b/large.jpg": large,
            "b/large_comment.jpg": jpeg(picture(30, 700), comment=b"again"),
            "b/large.png": saved(shown, "PNG"),
            "b/large_again.jpg": jpeg(picture(30, 700), quality=60),
            "b/turned.jpg": saved(turned.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif),
            "b/upright.png": saved(turned, "PNG"),
        },
    )
    report = as_json(examine(open_photos(str(root)), progress=False))
    assert [sorted(group) for group in report["exact_duplicate_groups"]] == [
        ["a/00.jpg", "a/comment.jpg", "a/copy.jpg"],
        ["b/large.jpg", "b/large.png", "b/large_comment.jpg"],
        ["b/turned.jpg", "b/upright.png"],
    ]
    assert [sorted(group) for group in report["near_duplicate_groups"]] == [
        ["b/large.jpg", "b/large.png", "b/large_again.jpg", "b/large_comment.jpg"]
    ]
    assert report["conflicting_labels"] == []


def test_near_duplicates_conflicts_and_leaks(tmp_path, capsys):
    files = healthy(each=15)
    files["a/copy.jpg"] = files["b/14.jpg"]  # the same file under two labels
    files["b/mirror.jpg"] = jpeg(ImageOps.mirror(picture(1)), 70)  # of a/01.jpg
    files["a/small.jpg"] = jpeg(picture(2).crop((10, 5, 214, 219)).resize((150, 158)), 70)
    root = write(tmp_path / "data", files)
    code, text, _ = run(root, tmp_path / "out", capsys)
    assert code == 0
    report = json.loads((tmp_path / "out" / "check.json").read_text())
    assert report["exact_duplicate_groups"] == [["a/copy.jpg", "b/14.jpg"]]
    assert report["near_duplicate_groups"] == [
        ["a/01.jpg", "b/mirror.jpg"],
        ["a/02.jpg", "a/small.jpg"],
    ]
    assert report["conflicting_labels"] == [
        [{"file": "a/01.jpg", "label": "a"}, {"file": "b/mirror.jpg", "label": "b"}],
        [{"file": "a/copy.jpg", "label": "a"}, {"file": "b/14.jpg", "label": "b"}],
    ]
    assert "problem  2 pictures under more than one label: 4 (a/01.jpg, b/mirror.jpg, " in text
    assert "warning  1 identical copy (3.0 % of the photos), in 1 group; delete" in text
    assert "warning  2 groups of near duplicates, 4 photos" in text


def test_the_leak_is_that_of_the_split_a_training_makes(tmp_path):
    files = healthy(each=10)
    files |= {name.replace(".jpg", "_copy.jpg"): files[name] for name in list(files)}
    files |= {f"a/{i:02}_near.jpg": jpeg(picture(i), 60) for i in range(10)}
    photos = open_photos(str(write(tmp_path, files)))
    examined = examine(photos, progress=False)
    originals = np.array([file[:4] for file in photos.files])
    pictures = photo_groups(photos, progress=False)
    for leak in examined.leaks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            split = split_photos(
                photos, pictures=pictures, val_fraction=0.2, kind=leak.split, seed=0
            )
        digests = np.array(photos.digests)
        identical = [i for i in split.val if (digests[split.train] == digests[i]).any()]
        alike = [i for i in split.val if (originals[split.train] == originals[i]).any()]
        assert leak.identical == pytest.approx(len(identical) / len(split.val))
        assert leak.alike == pytest.approx(len(alike) / len(split.val))
    assert [leak.split for leak in examined.leaks] == ["grouped", "random"]
    assert examined.leaks[0].identical == examined.leaks[0].alike == 0
    assert examined.leaks[1].alike > examined.leaks[1].identical > 0
    groups = np.array([0, 0, 1, 2, 2, 3])
    assert leaked_share(groups, np.array([0, 2, 3]), np.array([1, 4, 5])) == pytest.approx(2 / 3)


def test_the_leak_of_the_tables_own_split(tmp_path, capsys):
    """Ten pictures in validation, two of them copied to train and one mirrored there."""
    files = {f"train/{i:02}.jpg": jpeg(picture(i)) for i in range(40)}
    files["train/41.jpg"], files["train/42.jpg"] = files["train/00.jpg"], files["train/01.jpg"]
    files["train/43.jpg"] = jpeg(ImageOps.mirror(picture(2)))
    rows = [
        f"{name[6:]},{'ab'[int(name[6:8]) % 2]},{'val' if i < 10 else 'train'}"
        for i, name in enumerate(files)
    ]
    folder = write(tmp_path / "photos", files)
    (folder / "train.csv").write_text("\n".join(["filename,label,split", *rows]))
    examined = examine(open_photos(str(folder)), progress=False)
    given = examined.leaks[2]
    assert (given.split, given.identical, given.alike) == ("given", 0.2, 0.3)
    main([str(folder), "--out", str(tmp_path / "out")])
    assert (
        "problem  the column split leaves 30.0 % of the validation photos with a twin in train "
        "(20.0 % identical); remove the column" in capsys.readouterr().out
    )


def test_single_photos_that_look_wrong(tmp_path):
    frames = [picture(40, 64), picture(41, 64)]
    turned = Image.Exif()
    turned[0x0112] = 3
    deep = Image.fromarray(np.asarray(picture(42).convert("L")).astype(np.uint16) * 257)
    odd = {
        "blank": {"a/blank.jpg": jpeg(Image.new("RGB", (200, 200), "teal"))},
        "tiny": {"a/tiny.jpg": jpeg(picture(43, 63))},
        "longer side": {"a/long.jpg": jpeg(picture(44).resize((900, 250)))},
        "extension": {
            "a/webp.jpg": saved(picture(45), "WEBP"),
            "a/png.JPEG": saved(picture(46), "PNG"),
        },
        "turned": {"a/turned.jpg": jpeg(picture(47), exif=turned)},
        "animated": {"a/anim.gif": saved(frames[0], "GIF", save_all=True, append_images=frames)},
        "huge": {"a/huge.jpg": jpeg(picture(48, 4500), 40)},
        "odd colour": {
            "a/anim.gif": b"",
            "a/cmyk.jpg": jpeg(picture(49).convert("CMYK")),
            "a/alpha.png": saved(picture(50).convert("RGBA"), "PNG"),
            "a/deep.png": saved(deep, "PNG"),
        },
    }
    files = healthy()
    for group in odd.values():
        files |= {name: content for name, content in group.items() if content}
    says = found(write(tmp_path, files))
    assert len(says) == len(odd)
    for start, group in odd.items():
        (what,) = [what for what in says if what.startswith(start)]
        assert sorted(says[what]) == sorted(group)
    (modes,) = [what for what in says if what.startswith("odd colour")]
    assert {"CMYK 1", "RGBA 1", "P 1", "I;16 1"} == set(
        re.search(r"\((.*)\)", modes)[1].split(", ")
    )


def test_a_portrait_turned_by_exif_is_not_taken_for_another_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    files = healthy() | {"a/t.jpg": jpeg(picture(40).resize((300, 80)), exif=exif)}
    examined = examine(open_photos(str(write(tmp_path, files))), progress=False)
    look = examined.looks[examined.photos.files.index("a/t.jpg")]
    assert look.size == (80, 300)
    assert look.pixels is not None


def test_unreadable_files_and_rows_and_junk(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    files = {f"train/{i:02}.jpg": jpeg(picture(i)) for i in range(60)}
    files |= {
        "train/cut.jpg": jpeg(noise)[:9000],
        "train/unlisted.jpg": jpeg(picture(60)),
        "train/.DS_Store": b"x",
        "train/__MACOSX/00.jpg": b"x",
        "train/notes.txt": b"x",
    }
    rows = [(f"{i:02}.jpg", "ab"[i % 2]) for i in range(60)]
    rows += [("cut.jpg", "a"), ("gone.jpg", "b"), ("00.jpg", "a")]
    root = write(tmp_path, files)
    (root / "train.csv").write_text("filename,label\n" + "".join(f"{f},{c}\n" for f, c in rows))
    examined = examine(open_photos(str(root)), progress=False)
    report = as_json(examined)
    assert [item["file"] for item in report["unreadable"]] == ["gone.jpg", "cut.jpg"]
    assert "not there" in report["unreadable"][0]["reason"]
    assert "truncated" in report["unreadable"][1]["reason"]
    assert report["images"] == 61
    assert report["classes"] == {"a": 30, "b": 30}
    says = {f.what: f.files for f in findings(examined)}
    assert says["labels without file"] == ("gone.jpg",)
    assert says["unreadable"] == ("cut.jpg",)
    assert says["photos without label"] == ("unlisted.jpg",)
    assert says["listed twice under one label"] == ("00.jpg",)
    assert set(says["files that are no photos"]) == {".DS_Store", "notes.txt"}
    assert unusable(examined) is None


def test_photos_nobody_labelled_or_reads_are_not_called_junk(tmp_path):
    files = healthy() | {"stray.jpg": jpeg(picture(50)), "b/IMG_1.HEIC": b"x", "a/notes.txt": b"x"}
    files |= {"._stray.jpg": b"x", "a/._IMG_1.HEIC": b"x"}
    says = found(write(tmp_path, files))
    assert says["photos without label"] == ("stray.jpg",)
    assert says["photos in a format that is not read"] == ("b/IMG_1.HEIC",)
    assert set(says["files that are no photos"]) == {"._stray.jpg", "a/notes.txt", "a/._IMG_1.HEIC"}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_an_animation_cut_anywhere_ends_in_a_report(tmp_path, kind):
    """Where the first picture can be read it is used, though the next one is damaged."""
    frames = [picture(40 + i, 64) for i in range(3)]
    whole = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    cuts = {f"a/cut{k}.{kind.lower()}": whole[: len(whole) * k // 10] for k in range(1, 10)}
    files = healthy(each=3) | cuts | {f"a/whole.{kind.lower()}": whole}
    examined = examine(open_photos(str(write(tmp_path, files))), progress=False)
    bad = {file for file, _ in examined.unreadable}
    assert bad <= set(cuts)
    (animated,) = [f for f in findings(examined) if f.what.startswith("animated")]
    assert f"a/whole.{kind.lower()}" in animated.files


def test_a_split_column_that_leaves_a_class_untrained_ends_in_3(tmp_path, capsys):
    files = {f"train/{i:02}.jpg": jpeg(picture(i)) for i in range(24)}
    root = write(tmp_path / "data", files)
    rows = [f"{i:02}.jpg,{'ab'[i % 2]},{'val' if i % 2 or i < 4 else 'train'}" for i in range(24)]
    (root / "train.csv").write_text("\n".join(["filename,label,split", *rows]))
    code, _, errors = run(root, tmp_path / "out", capsys)
    assert code == 3
    assert "the column split leaves class b of data without photos in train" in errors


def test_classes_that_are_small_or_unequal(tmp_path):
    files = {f"big/{i}.jpg": jpeg(picture(i)) for i in range(40)}
    files |= {f"rare/{i}.jpg": jpeg(picture(50 + i)) for i in range(4)}
    says = found(write(tmp_path, files))
    assert list(says) == [
        "class rare has 4 readable photos",
        "class big has 10 times the photos of rare",
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f | {"b/x.jpg": b"", "b/y.jpg": b"<html>"}, r"7\.7% of the photos of data"),
        (lambda f: f | {"c/1.jpg": jpeg(picture(50))}, "class c of data has too few .* 1 instead"),
        (lambda f: f | {"c/1.jpg": b"", "c/2.jpg": b"x"}, "class c of data has too few .* 0 inst"),
        (lambda f: {k: v for k, v in f.items() if k < "b"}, "1 class "),
        (lambda f: {}, "is no folder"),
        (lambda f: {"train.csv": b"filename,label\n../x.jpg,a\n", "train/x.jpg": b""}, "row 2"),
        (lambda f: {"train.csv": b"filename,label\nx,a\nx,b\n", "train/x": b""}, "two labels"),
    ],
)
def test_photos_that_cannot_be_trained_on_end_in_3_with_one_sentence(
    tmp_path, capsys, damage, message
):
    root = write(tmp_path / "data", damage(healthy()))
    code, _, errors = run(root, tmp_path / "out", capsys)
    assert code == 3
    (sentence,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert re.search(message, sentence)


def test_reports_are_written_though_the_photos_are_unusable(tmp_path, capsys):
    root = write(tmp_path / "data", healthy() | {"b/x.jpg": b"", "b/y.jpg": b""})
    code, text, _ = run(root, tmp_path / "out", capsys)
    assert code == 3
    report = json.loads((tmp_path / "out" / "check.json").read_text())
    assert report["unreadable"] == [
        {"file": "b/x.jpg", "reason": "empty file"},
        {"file": "b/y.jpg", "reason": "empty file"},
    ]
    assert report["exact_duplicate_groups"] == []
    assert "unreadable: 2 (b/x.jpg, b/y.jpg)" in text


def test_an_output_that_cannot_be_written_ends_in_7(tmp_path, capsys):
    root = write(tmp_path / "data", healthy(each=2))
    (tmp_path / "out").write_text("in the way")
    code, _, errors = run(root, tmp_path / "out", capsys)
    assert code == 7
    assert str(tmp_path / "out") in errors


def test_hostile_names_are_escaped_on_the_page_and_the_terminal(tmp_path, capsys):
    hostile, moving = "<img src=x onerror=alert(1)>", "\x1b[31mred"
    files = healthy()
    files |= {f"{hostile}/{i}.jpg": files["a/01.jpg"] for i in range(3)}
    files |= {f"{moving}/{i}.jpg": jpeg(picture(1), 60 + i) for i in range(3)}
    code, text, _ = run(write(tmp_path / "data", files), tmp_path / "out", capsys)
    assert code == 0
    assert "\x1b" not in text
    page = (tmp_path / "out" / "check.html").read_text()
    assert hostile not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "http" not in re.sub(r'"data:[^"]*"|http-equiv', "", page)


def test_the_page_shows_every_group(tmp_path, capsys):
    files = healthy(each=20)
    files |= {f"a/copy{i}.jpg": files[f"a/{i:02}.jpg"] for i in range(10)}
    files |= {f"a/near{i}.jpg": jpeg(picture(i), 50) for i in range(10, 15)}
    run(write(tmp_path / "data", files), tmp_path / "out", capsys)
    page = (tmp_path / "out" / "check.html").read_text()
    for i in range(10):
        assert f"a/{i:02}.jpg, a/copy{i}.jpg" in page
    for i in range(10, 15):
        assert re.search(rf"a/{i:02}\.jpg; 2\. a/near{i}\.jpg", page)
    assert page.count("data:image/webp") == 5 + 1


def test_the_command_itself(tmp_path):
    root = write(tmp_path / "data", healthy(each=2))
    command = [sys.executable, "-m", "train.data.check", str(root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    assert (tmp_path / "runs" / "check-data" / "check.html").is_file()
    assert "looking" in result.stderr


content = st.one_of(
    st.binary(max_size=60),
    st.integers(0, 5).map(lambda i: jpeg(picture(i, 96), 80)),
    st.tuples(st.integers(0, 5), st.floats(0, 1)).map(
        lambda t: (lambda data: data[: int(len(data) * t[1])])(jpeg(picture(t[0], 96), 80))
    ),
    st.tuples(st.integers(0, 5), st.integers(0, 2**16), st.integers(0, 255)).map(
        lambda t: (
            lambda data: data[: t[1] % len(data)] + bytes([t[2]]) + data[t[1] % len(data) :]
        )(jpeg(picture(t[0], 96), 80))
    ),
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(content, min_size=2, max_size=6), st.lists(content, min_size=2, max_size=6))
def test_no_content_is_lost_whatever_it_is(tmp_path_factory, first, second):
    """Each file is either shown or listed as unreadable, and identical ones are always found."""
    root = tmp_path_factory.mktemp("data")
    files = {f"a/{i}.jpg": data for i, data in enumerate(first)}
    files |= {f"b/{i}.png": data for i, data in enumerate(second)}
    examined = examine(open_photos(str(write(root, files))), progress=False)
    report = as_json(examined)
    assert set(report) == KEYS
    unreadable = {item["file"] for item in report["unreadable"]}
    assert report["images"] == len(files)
    assert sum(report["classes"].values()) + len(unreadable) == len(files)
    digests = {name: hashlib.sha256(data).digest() for name, data in files.items()}
    for group in report["exact_duplicate_groups"] + report["near_duplicate_groups"]:
        assert not unreadable & set(group)
    group_of = {f: k for k, g in enumerate(report["exact_duplicate_groups"]) for f in g}
    for name in files.keys() - unreadable:
        for other in files.keys() - unreadable - {name}:
            if digests[name] == digests[other]:
                assert group_of[name] == group_of[other]
    findings(examined)


@pytest.mark.skipif(not (DATA / "food5").is_dir(), reason="the photos are not here")
def test_food5():
    """38.8 % of its files are copies of another; the near duplicates were judged by eye."""
    examined = examine(open_photos(str(DATA / "food5")), progress=False)
    report = as_json(examined)
    assert report["images"] == 881
    assert report["unreadable"] == []
    assert sum(len(group) - 1 for group in report["exact_duplicate_groups"]) == 342
    near = [set(group) for group in report["near_duplicate_groups"]]
    assert len(near) == 69
    assert len(np.unique(examined.pictures)) == 437
    for mirrored_or_cropped in (
        {"0115.jpg", "1104.jpg"},
        {"0718.jpg", "0500.jpg"},
        {"0010.jpg", "0763.jpg"},
        {"0413.jpg", "0784.jpg"},
        {"0236.jpg", "0299.jpg"},
    ):
        assert any(mirrored_or_cropped <= group for group in near)
    grouped, random = examined.leaks
    assert (grouped.split, grouped.identical) == ("grouped", 0)
    assert 0.5 < random.identical < 0.65 <= random.alike + 0.05


@pytest.mark.skipif(not (DATA / "food5-raw").is_dir(), reason="the photos are not here")
def test_food5_raw():
    says = found(DATA / "food5-raw")
    counts = {what: len(files) for what, files in says.items()}
    assert counts["extension of another format"] == 35
    assert counts["odd colour modes (P 3)"] == 3
    assert "unreadable" not in says

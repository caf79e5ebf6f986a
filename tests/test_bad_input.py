"""Whatever lies in a folder: read right, left out with a reason, or refused in one sentence."""

import csv
import hashlib
import io
import os
import random
import string
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from train.data import open_photos
from train.data.photos import UnreadablePhoto, decode
from train.errors import DataError

bounded = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

FILES = ("a.jpg", "b b.jpg", "ü/é.png", "deep/er/c.JPG", "d,d.jpg", 'q"q.webp', "semi;.gif")
SECRET = b"outside of the folder"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """train/ with FILES, a link and a linked folder that lead out, a pipe, and a secret beside."""
    root = tmp_path_factory.mktemp("bad") / "set"
    for i, file in enumerate(FILES):
        path = root / "train" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([i]))
    (root.parent / "secret.jpg").write_bytes(SECRET)
    (root / "train" / "link.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "train" / "elsewhere").symlink_to(root.parent)
    (root / "train" / "loop").symlink_to(root / "train")
    os.mkfifo(root / "train" / "pipe.jpg")
    return root


def outcome(function, error) -> tuple[Any, str]:
    """What `function` returns and "", or None and the message of the `error` it raises."""
    try:
        return function(), ""
    except error as raised:
        return None, str(raised)


# tables


@st.composite
def tables(draw) -> tuple[dict[str, str], bytes]:
    """Which file has which label, and a table that says so in one of the ways programs write."""
    labels = st.sampled_from(("bakso", "soto ayam", "nasi, goreng", "<img onerror=x>", "Ω", "1"))
    files = draw(st.permutations(FILES))[: draw(st.integers(2, len(FILES)))]
    truth = {file: draw(labels) for file in files}
    delimiter = draw(st.sampled_from(",;\t"))
    columns = draw(st.permutations(["filename", "label", "note"]))
    space = " " * draw(st.integers(0, 2))
    always = draw(st.booleans())

    def row(values: dict[str, str]) -> str:
        text = io.StringIO()
        quoting = csv.QUOTE_ALL if always else csv.QUOTE_MINIMAL
        writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="")
        for i, column in enumerate(columns):
            text.write((delimiter if i else "") + space)
            writer.writerow([values[column]])
        return text.getvalue()

    slash = "\\" if draw(st.booleans()) else "/"
    dot = draw(st.sampled_from(("", "./")))
    rows = [row({c: c.upper() if always else c for c in columns})]
    for file, label in truth.items():
        rows += draw(st.sampled_from(([], [""], [delimiter], [" "])))
        rows.append(row({"filename": dot + file.replace("/", slash), "label": label, "note": "n"}))
    end = draw(st.sampled_from(("\n", "\r\n")))
    last = draw(st.sampled_from(("", end)))
    mark = draw(st.sampled_from(("", "\ufeff")))
    return truth, (mark + end.join(rows) + last).encode()


@bounded
@given(tables())
def test_a_table_means_the_same_however_it_is_written(folder, case):
    truth, content = case
    (folder / "train.csv").write_bytes(content)
    if len(set(truth.values())) < 2:
        with pytest.raises(DataError, match="1 class"):
            open_photos(str(folder))
        return
    photos = open_photos(str(folder))
    assert photos.files == tuple(truth)
    assert [photos.classes[label] for label in photos.labels] == list(truth.values())
    assert not [item for item in photos.excluded if item.bad]


NAMES = st.one_of(
    st.sampled_from(FILES),
    st.sampled_from(
        (
            "../secret.jpg",
            "..\\secret.jpg",
            "deep/../../../secret.jpg",
            "link.jpg",
            "elsewhere/secret.jpg",
            "loop/loop/a.jpg",
            "pipe.jpg",
            "/etc/passwd",
            "C:\\secret.jpg",
            "\\\\host\\secret.jpg",
            "deep",
            "a.jpg/",
            "a.jpg/a.jpg",
            ".",
            "..",
            "~/secret.jpg",
            "$HOME/secret.jpg",
            "x" * 300,
            "A.JPG",
            '"',
        )
    ),
    st.text(string.printable + "\0\u202e\ufeff", max_size=8),
)


@settings(bounded, max_examples=150)
@given(
    st.lists(st.tuples(NAMES, st.sampled_from(("x", "y", "", " z "))), max_size=6), st.booleans()
)
@example([("a.jpg", "x"), ("elsewhere/secret.jpg", "y")], True)
@example([("a.jpg", "x"), ("loop/loop/a.jpg", "y")], True)
def test_no_table_opens_what_lies_outside_or_ends_in_a_traceback(folder, rows, quoted):
    text = io.StringIO()
    if quoted:
        csv.writer(text).writerows(rows)
    else:
        text.write("\n".join(",".join(row) for row in rows))
    (folder / "train.csv").write_bytes(("filename,label\n" + text.getvalue()).encode())
    photos, refused = outcome(lambda: open_photos(str(folder)), DataError)
    assert "\n" not in refused
    if photos is None:
        return
    root = os.path.realpath(folder / "train")
    for file, digest in zip(photos.files, photos.digests, strict=True):
        path = os.path.realpath(os.path.join(root, file))
        assert path.startswith(root + os.sep)
        assert digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert hashlib.sha256(SECRET).hexdigest() not in photos.digests
    listed = {file for file, _ in rows}
    bad = [item for item in photos.excluded if item.bad]
    assert len(photos) + len(bad) <= len(listed)


@bounded
@given(st.binary(max_size=200))
def test_bytes_that_are_no_table(folder, content):
    (folder / "train.csv").write_bytes(content)
    with pytest.raises(DataError):
        open_photos(str(folder))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.jpg,soto,ayam\nb b.jpg,y\n", r"row 2 of .* does not fit the 2 columns"),
        ('a.jpg,"x\nb b.jpg,y\n', r"row 3 of .*(not CSV|does not fit)"),
        ('a.jpg,"x\nb b.jpg,y"\n', r"row 3 of .* does not fit the 2 columns"),
        ('a.jpg,"x"y\n', r"row 2 of .* is not CSV"),
    ],
)
def test_a_row_that_does_not_fit_is_not_read_as_something_else(folder, rows, message):
    (folder / "train.csv").write_text("filename,label\n" + rows)
    with pytest.raises(DataError, match=message):
        open_photos(str(folder))


# folders

PARTS = ("bakso", "soto", "1.jpg", "2.PNG", "3.txt", ".DS_Store", "__MACOSX", "a b", "é.jpeg")


@bounded
@given(st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3), max_size=12))
def test_every_file_of_a_folder_is_a_photo_or_left_out(paths):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        written = set()
        for parts in paths:
            path = root.joinpath(*parts)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"x")
            except OSError:  # a file stands where a folder is needed
                continue
            if not any(part.startswith(".") or part == "__MACOSX" for part in parts[:-1]):
                written.add("/".join(parts))
        classes = {p.name for p in root.iterdir() if p.is_dir()} - {"__MACOSX", ".DS_Store"}
        full = {path.split("/")[0] for path in written if "/" in path and _is_photo(path)}
        photos, _ = outcome(lambda: open_photos(name), DataError)
        assert (photos is None) == (len(classes) < 2 or classes != full)
        if photos is None:
            return
        left_out = {item.file for item in photos.excluded}
        assert set(photos.files) == {p for p in written if "/" in p and _is_photo(p)}
        assert written - set(photos.files) <= left_out


def _is_photo(path: str) -> bool:
    name = path.split("/")[-1]
    return not name.startswith(".") and name.lower().endswith((".jpg", ".png", ".jpeg"))


def test_a_linked_folder_is_listed_and_one_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    for label in "xy":
        (tmp_path / label / "more").mkdir(parents=True)
        (tmp_path / label / "1.jpg").write_bytes(b"x")
    (tmp_path / "x" / "again").symlink_to(tmp_path / "y")
    photos = open_photos(str(tmp_path))
    assert [(e.file, e.reason) for e in photos.excluded] == [
        ("x/again", "a link to a folder, not followed")
    ]
    real = os.scandir

    def scandir(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"x/more cannot be listed \(Permission denied\)"):
        open_photos(str(tmp_path))


# photos


def stored(kind: str, **options) -> bytes:
    """A picture full of detail, so that every format needs many bytes for it."""
    y, x = np.mgrid[0:96, 0:128]
    noise = np.random.default_rng(0).integers(0, 24, (96, 128, 3))
    pixels = np.stack([x + y // 2, 2 * y, 255 - x - y // 2], -1) + noise
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, kind, **options)
    return stream.getvalue()


STORED = {
    "jpeg": stored("JPEG", quality=92),
    "progressive": stored("JPEG", quality=92, progressive=True),
    "png": stored("PNG"),
    "webp": stored("WEBP"),
    "lossless": stored("WEBP", lossless=True),
    "gif": stored("GIF"),
    "avif": stored("AVIF"),
    "bmp": stored("BMP"),
    "tiff": stored("TIFF"),
    "ppm": stored("PPM"),
}
PICTURES = {name: np.asarray(decode(content)) for name, content in STORED.items()}


@pytest.mark.parametrize("name", STORED)
@settings(bounded, max_examples=25)
@given(st.floats(0, 1, exclude_max=True))
def test_a_cut_photo_is_refused_or_whole(name, share):
    content = STORED[name][: int(share * len(STORED[name]))]
    picture, _ = outcome(lambda: decode(content), UnreadablePhoto)
    assert picture is None or np.array_equal(picture, PICTURES[name])


@pytest.mark.parametrize("name", ["jpeg", "progressive", "png", "webp", "lossless", "gif", "avif"])
@settings(bounded, max_examples=25)
@given(st.floats(0, 1, exclude_max=True))
def test_a_photo_whose_end_was_never_written_is_refused(name, share):
    """What an interrupted copy leaves where the length is set first: Pillow decodes it to grey."""
    whole = STORED[name]
    kept = int(share * (len(whole) - 64))
    with pytest.raises(UnreadablePhoto):
        decode(whole[:kept] + bytes(len(whole) - kept))


@pytest.mark.parametrize("name", ["jpeg", "progressive", "webp", "png"])
def test_zeros_after_the_end_do_no_harm(name):
    assert np.array_equal(decode(STORED[name] + bytes(5000)), PICTURES[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STORED)
@settings(bounded, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_a_damaged_photo_is_a_picture_or_unreadable_and_nothing_else(name, seed):
    generator = random.Random(seed)
    content = bytearray(STORED[name])
    limit = 200 if generator.random() < 0.7 else len(content)  # headers are where it hurts
    for _ in range(generator.randint(1, 8)):
        content[generator.randrange(min(limit, len(content)))] = generator.randrange(256)
    picture, refused = outcome(lambda: decode(bytes(content), 64), UnreadablePhoto)
    assert "\n" not in refused
    if picture is None:
        return
    assert picture.mode == "RGB"
    if name == "png":  # the one format here with checksums
        assert np.array_equal(decode(bytes(content)), PICTURES[name])


@pytest.mark.filterwarnings("ignore")
@bounded
@given(
    st.sampled_from(
        [content[:k] for content in STORED.values() for k in (4, 12, 30)] + [b"<html>"]
    ),
    st.binary(max_size=400),
)
def test_noise_is_no_photo(start, noise):
    with warnings.catch_warnings(), pytest.raises(UnreadablePhoto):
        decode(start + noise)

"""Sources: what becomes of every kind of folder, table and file."""

import hashlib
import io
import json
import os
import resource
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from train.data import open_photos
from train.data.photos import UnreadablePhoto, decode
from train.errors import DataError, UsageError


def jpeg(path: Path, colour=(200, 60, 30), size=(40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, "JPEG")
    return path


@pytest.fixture
def table(tmp_path):
    """Writes train.csv (bytes or text) beside four photos in train/ and gives the folder."""
    for i, name in enumerate("abcd"):
        jpeg(tmp_path / "train" / f"{name}.jpg", (20 * i, 60, 30))

    def write(text: str | bytes) -> str:
        (tmp_path / "train.csv").write_bytes(text.encode() if isinstance(text, str) else text)
        return str(tmp_path)

    return write


ROWS = "filename,label\na.jpg,x\nb.jpg,y\nc.jpg,x\nd.jpg,y\n"


@pytest.mark.parametrize(
    "text",
    [
        ROWS,
        ROWS.replace("\n", "\r\n"),
        "\ufeff" + ROWS,
        ROWS.replace(",", ";"),
        ROWS.replace(",", "\t"),
        ROWS.replace(",", "  ,  "),
        ROWS.replace("\n", "\n\n , \n"),
        "label,other,FileName\nx,1,a.jpg\ny,2,b.jpg\nx,3,c.jpg\ny,4,d.jpg\n",
        ROWS.replace("a.jpg", '"a.jpg"').replace("b.jpg", "./b.jpg"),
    ],
    ids=["plain", "crlf", "bom", "semicolon", "tab", "spaces", "blank", "order", "quoted"],
)
def test_table_variants_read_the_same(table, text):
    photos = open_photos(table(text))
    assert photos.files == ("a.jpg", "b.jpg", "c.jpg", "d.jpg")
    assert photos.classes == ("x", "y")
    assert photos.labels.tolist() == [0, 1, 0, 1]
    assert photos.labels.dtype == np.int64
    assert photos.excluded == ()
    expected = hashlib.sha256((Path(table(text)) / "train" / "c.jpg").read_bytes()).hexdigest()
    assert photos.digests[2] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no photos"),
        ("filename,label\n", "lists no photos"),
        ("file,label\na.jpg,x\n", "column filename"),
        ("filename;label;label\na.jpg;x;y\n", "column label"),
        (ROWS + "e.jpg,\n", "row 6 of .* has no label"),
        (ROWS + "e.jpg\n", "row 6 of .* has no label"),
        (ROWS + ",x\n", "row 6 of .* has no filename"),
        (ROWS + "a.jpg,y\n", "two labels, x in row 2 and y in row 6"),
        (ROWS + "../train.csv,x\n", "row 6 .*outside"),
        (ROWS + "sub/../../train.csv,x\n", "row 6 .*outside"),
        (ROWS + "..\\train.csv,x\n", "row 6 .*outside"),
        (ROWS + "/etc/passwd,x\n", "row 6 .*outside"),
        (ROWS + "C:\\a.jpg,x\n", "row 6 .*outside"),
        ("filename,label\na.jpg,x\nb.jpg,x\n", "1 class"),
        (ROWS.encode("utf-16"), "UTF-8"),
        (ROWS + "e\0.jpg,x\n", "NUL"),
        ("filename,label\nnone.jpg,x\nnothing.jpg,y\n", "none of the 2 photos"),
    ],
)
def test_tables_that_cannot_be_trusted(table, text, message):
    with pytest.raises(DataError, match=message) as caught:
        open_photos(table(text))
    assert "\n" not in str(caught.value)


def test_paths_outside_are_refused_before_anything_is_opened(table, tmp_path, monkeypatch):
    folder = table(ROWS + "link.jpg,x\n")
    outside = jpeg(tmp_path.parent / "outside.jpg")
    (tmp_path / "train" / "link.jpg").symlink_to(outside)
    opened = []
    real_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: opened.append(self.name) or real_open(self, *a, **k)
    )
    with pytest.raises(DataError, match=r"row 6 .*leads out of"):
        open_photos(folder)
    assert not [name for name in opened if name.endswith(".jpg")]


def test_a_symlink_that_stays_inside_is_fine(table, tmp_path):
    (tmp_path / "train" / "e.jpg").symlink_to(tmp_path / "train" / "a.jpg")
    photos = open_photos(table(ROWS + "e.jpg,x\n"))
    assert photos.digests[0] == photos.digests[4]


def test_what_is_left_out_is_counted_with_its_reason(table, tmp_path):
    jpeg(tmp_path / "train" / "unlisted.jpg")
    (tmp_path / "train" / ".DS_Store").write_bytes(b"junk")
    jpeg(tmp_path / "train" / "__MACOSX" / "a.jpg")
    os.mkfifo(tmp_path / "train" / "pipe.jpg")
    photos = open_photos(table(ROWS + "missing.jpg,x\na.jpg,x\npipe.jpg,y\n"))
    left_out = {(item.file, item.bad): item.reason for item in photos.excluded}
    assert left_out == {
        ("a.jpg", False): "listed again in row 7",
        ("unlisted.jpg", False): "no row in train.csv",
        (".DS_Store", False): "not a photo",
        ("missing.jpg", True): "listed, but not there",
        ("pipe.jpg", True): "is not a regular file",
    }
    assert len(photos) == 4


def test_a_split_column_gives_each_photo_its_side(table):
    rows = "filename,label,Split\na.jpg,x,train\nb.jpg,y, VAL\nc.jpg,x,val\nd.jpg,y,train\n"
    photos = open_photos(table(rows))
    assert photos.sides == ("train", "val", "val", "train")
    assert photos.subset([2, 0]).sides == ("val", "train")
    assert open_photos(table(ROWS)).sides is None
    again = open_photos(table(rows + "a.jpg,x,train\n"))
    assert (again.sides, len(again.excluded)) == (photos.sides, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("d.jpg,y,test", "row 5 of .* has the split 'test': write train or val"),
        ("d.jpg,y,", "row 5 of .* has the split '': write train or val"),
        ("d.jpg,y", "row 5 of .* has the split ''"),
        ("c.jpg,x,train", "row 5 of .* gives c.jpg a second side, train: keep one"),
    ],
)
def test_a_split_column_that_cannot_be_trusted(table, row, message):
    rows = "filename,label,split\na.jpg,x,train\nb.jpg,y,val\nc.jpg,x,val\n"
    with pytest.raises(DataError, match=message):
        open_photos(table(rows + row + "\n"))


def test_folder_per_class(tmp_path):
    for label in ("rendang", "bakso", "<img onerror=x>"):
        jpeg(tmp_path / label / "1.jpg")
        jpeg(tmp_path / label / "deep" / "2.JPEG", (1, 2, 3))
    jpeg(tmp_path / ".thumbnails" / "1.jpg")
    jpeg(tmp_path / "__MACOSX" / "1.jpg")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bakso" / "Thumbs.db").write_bytes(b"junk")
    (tmp_path / "bakso" / "phone.HEIC").write_bytes(b"junk")
    photos = open_photos(str(tmp_path))
    assert photos.classes == ("<img onerror=x>", "bakso", "rendang")
    assert photos.files[2:] == (
        "bakso/1.jpg",
        "bakso/deep/2.JPEG",
        "rendang/1.jpg",
        "rendang/deep/2.JPEG",
    )
    assert {item.file for item in photos.excluded} == {
        ".thumbnails",
        "__MACOSX",
        "notes.txt",
        "bakso/Thumbs.db",
        "bakso/phone.HEIC",
    }
    assert "convert it to JPEG" in next(e.reason for e in photos.excluded if "HEIC" in e.file)
    assert not any(item.bad for item in photos.excluded)
    two = open_photos(str(tmp_path), classes=("rendang", "bakso"))
    assert two.classes == ("bakso", "rendang")
    assert len(two) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no folder per class"),
        (lambda p: jpeg(p / "1.jpg"), "no folder per class"),
        (lambda p: (jpeg(p / "a" / "1.jpg"), (p / "b").mkdir()), "class folder .*b has no photos"),
        (lambda p: jpeg(p / "a" / "1.jpg"), "1 class "),
        (lambda p: (jpeg(p / "train" / "a" / "1.jpg"), jpeg(p / "val" / "a" / "1.jpg")), "--data"),
        (lambda p: (p / "train.csv").write_text(ROWS), "no folder train/"),
    ],
)
def test_folders_that_cannot_be_trained_on(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        open_photos(str(tmp_path))


def test_a_class_folder_may_not_lead_outside_either(tmp_path):
    jpeg(tmp_path / "data" / "a" / "1.jpg")
    jpeg(tmp_path / "data" / "b" / "1.jpg")
    (tmp_path / "data" / "b" / "2.jpg").symlink_to(jpeg(tmp_path / "secret.jpg"))
    with pytest.raises(DataError, match=r"2\.jpg leads out of"):
        open_photos(str(tmp_path / "data"))


def test_unknown_data_and_classes(tmp_path):
    with pytest.raises(DataError, match="nowhere is no folder"):
        open_photos(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"--classes names pizza.*choose from bakso, gado_gado"):
        open_photos("synthetic", classes=("pizza", "bakso"))
    with pytest.raises(DataError, match="at least two"):
        open_photos("synthetic", classes=("bakso",))


def food101(root: Path) -> Path:
    base = root / "food-101"
    tables = {"train": {}, "test": {}}
    for k, label in enumerate(("waffles", "apple_pie", "ramen")):
        for part, numbers in (("train", (1, 2, 3)), ("test", (4,))):
            tables[part][label] = [f"{label}/{k}{n}" for n in numbers]
            for n in numbers:
                jpeg(base / "images" / label / f"{k}{n}.jpg", (40 * k, 20 * n, 0))
    (base / "meta").mkdir()
    for part, content in tables.items():
        (base / "meta" / f"{part}.json").write_text(json.dumps(content))
    return base


def test_food101_lists_what_torchvision_lists(tmp_path):
    from torchvision.datasets import Food101

    base = food101(tmp_path)
    theirs = {
        (Path(file).relative_to(base / "images").as_posix(), dataset.classes[label])
        for dataset in (Food101(tmp_path, "train"), Food101(tmp_path, "test"))
        for file, label in zip(dataset._image_files, dataset._labels, strict=True)
    }
    for given in (tmp_path, base):
        photos = open_photos(f"food101:{given}")
        labels = (photos.classes[label] for label in photos.labels)
        assert set(zip(photos.files, labels, strict=True)) == theirs
        assert len(photos) == 12
    photos = open_photos(f"food101:{tmp_path}", classes=("ramen", "waffles"))
    assert photos.classes == ("ramen", "waffles")
    assert len(photos) == 8


def test_food101_that_is_not_there_or_damaged(tmp_path):
    with pytest.raises(DataError, match="does not hold Food-101"):
        open_photos(f"food101:{tmp_path}")
    (food101(tmp_path) / "meta" / "test.json").write_text('["x"]')
    with pytest.raises(DataError, match=r"test\.json is damaged"):
        open_photos(f"food101:{tmp_path}")


# ---- one file ----


def gradient(height: int = 32, width: int = 48) -> np.ndarray:
    """Every pixel differs from its mirror images, smoothly, so that JPEG keeps it."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = gradient()
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turns[orientation](upright))
    path = tmp_path / "turned.jpg"
    Image.fromarray(stored).save(path, quality=98, exif=exif)
    shown = np.asarray(decode(path)).astype(int)
    assert shown.shape == upright.shape
    assert np.abs(shown - upright).mean() < 2


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF", "BMP", "TIFF", "MPO", "PPM", "AVIF"])
def test_the_content_decides_the_format_not_the_name(tmp_path, kind):
    path = tmp_path / "photo.jpg"
    Image.fromarray(gradient()).save(path, kind)
    shown = np.asarray(decode(path)).astype(int)
    assert np.abs(shown - gradient()).mean() < 12  # GIF has 256 colours


def test_odd_modes_are_converted_right(tmp_path):
    colour = (200, 60, 30)
    plain = Image.new("RGB", (16, 16), colour)

    def shown(image: Image.Image, kind: str, **options) -> np.ndarray:
        path = tmp_path / "odd.jpg"
        image.save(path, kind, **options)
        pixels = np.asarray(decode(path))
        assert pixels.shape == (16, 16, 3)
        return pixels.reshape(-1, 3).mean(0)

    assert np.abs(shown(plain.convert("CMYK"), "JPEG", quality=95) - colour).max() < 4
    assert (
        np.abs(shown(plain.convert("P", palette=Image.Palette.ADAPTIVE), "PNG") - colour).max() < 4
    )
    assert np.abs(shown(plain.convert("L"), "JPEG") - plain.convert("L").getpixel((0, 0))).max() < 2
    # 16 bits: 40000 of 65535 is 155.6 of 255, where Pillow's own conversion gives white
    deep = Image.fromarray(np.full((16, 16), 40000, np.uint16))
    assert np.abs(shown(deep, "PNG") - 156).max() <= 1
    assert np.abs(shown(deep, "TIFF") - 156).max() <= 1
    path = tmp_path / "odd.png"
    cv2.imwrite(str(path), np.full((16, 16, 3), (10000, 20000, 40000), np.uint16))  # BGR
    assert np.abs(np.asarray(decode(path)) - np.array([156, 78, 39])).max() <= 1
    # transparent pixels lie on white; half transparent ones are half of each
    clear = plain.convert("RGBA")
    clear.putalpha(0)
    assert np.abs(shown(clear, "PNG") - 255).max() == 0
    clear.putalpha(128)
    assert np.abs(shown(clear, "PNG") - (np.array(colour) + 255) / 2).max() < 2
    frames = [plain, Image.new("RGB", (16, 16), (0, 0, 255))]
    assert (
        np.abs(shown(frames[0], "GIF", save_all=True, append_images=frames[1:]) - colour).max() < 4
    )


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_files_say_why(tmp_path):
    whole = jpeg(tmp_path / "whole.jpg", size=(200, 200)).read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.jpg")
    cut = (tmp_path / "noise.jpg").read_bytes()[:9000]
    floats = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(floats, "TIFF")
    cases = {
        b"": "empty file",
        b"<!DOCTYPE html><html><body>404</body></html>": "not an image",
        cut: "damaged: .*truncated",
        whole[:30]: "damaged|not an image",
        png_header(20000, 8000): "more than 134 million pixels",
        png_header(60000, 60000): "more than 134 million pixels",
        floats.getvalue(): "no known range",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not an image",
    }
    for content, reason in cases.items():
        path = tmp_path / "bad.jpg"
        path.write_bytes(content)
        with pytest.raises(UnreadablePhoto, match=reason):
            decode(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_without_decoding(tmp_path):
    """Memory stays bounded: 12,000 x 12,000 pixels of one colour are 0.5 GB from a 0.4 MB file."""
    path = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadablePhoto, match="million pixels"):
        decode(path, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_file_the_system_refuses_is_an_error_not_a_bad_photo(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg cannot be read"):
        decode(tmp_path / "gone.jpg")


def test_reduced_decoding_stays_close_and_large_enough(tmp_path):
    big = np.asarray(
        Image.fromarray(gradient(96, 128)).resize((2048, 1536), Image.Resampling.BICUBIC)
    )
    path = tmp_path / "big.jpg"
    Image.fromarray(big).save(path, quality=95)
    small = decode(path, 64)
    assert 192 <= min(small.size) < 1536
    expected = np.asarray(Image.fromarray(big).resize((128, 96))).astype(int)
    assert np.abs(np.asarray(small.resize((128, 96))).astype(int) - expected).mean() < 1


def test_read_and_subset(table):
    photos = open_photos(table(ROWS))
    assert np.abs(photos.read(3).astype(int) - (60, 60, 30)).max() < 4
    part = photos.subset([3, 0])
    assert part.files == ("d.jpg", "a.jpg")
    assert part.labels.tolist() == [1, 0]
    assert part.digests == (photos.digests[3], photos.digests[0])
    assert np.array_equal(part.read(0), photos.read(3))
